"""By which interface several machines reach each other; test_launch.py trains over it between two hosts."""

import os
import sys
from unittest.mock import patch

import pytest

from vaetrain.distributed import network
from vaetrain.distributed.network import GLOO_VARIABLE, choose_interface, default_route, set_gloo_interface

MACHINE = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


@pytest.mark.parametrize(
    ("main_host", "own", "several_machines", "interface"),
    [
        ("gpu08", "10.1.0.7", True, "ib0"),  # what leads there, though it is not the default route's
        ("gpu07", "127.0.0.1", True, "eth0"),  # Debian's main node, whose own name is 127.0.1.1
        ("gpu07", "127.0.0.1", False, "lo"),
        ("127.0.0.1", "127.0.0.1", True, "lo"),  # several "machines" that are one, for a trial
        ("localhost", "127.0.0.1", True, "lo"),
        ("gpu08", "192.168.0.1", True, None),
    ],
)
def test_the_interface_towards_the_main_process(main_host, own, several_machines, interface):
    assert choose_interface(main_host, own, MACHINE, "eth0", several_machines=several_machines) == interface


def test_without_a_default_route_it_is_the_only_one_that_leads_out():
    two = {"lo": "127.0.0.1", "cable": "10.213.77.1"}
    assert choose_interface("gpu07", "127.0.0.1", two, None, several_machines=True) == "cable"
    with pytest.raises(ValueError, match=r"gpu07, .* docker0 or eth0 or ib0 could .* set GLOO_SOCKET_IFNAME"):
        choose_interface("gpu07", "127.0.0.1", MACHINE, None, several_machines=True)
    with pytest.raises(ValueError, match="no interface could lead"):
        choose_interface("gpu07", "127.0.0.1", {"lo": "127.0.0.1"}, None, several_machines=True)


def test_the_default_route_is_that_of_the_lowest_metric():
    rows = [
        "wlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0",
        "eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0",
        "ib0\t0000010A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0",
        "tun0\t00000000\t0000000A\t0003\t0\t0\t50\t00000080\t0\t0\t0",  # half of all addresses, as some VPNs have it
    ]
    assert default_route(HEADER + "\n".join(rows)) == "eth0"
    assert default_route(HEADER) is None
    assert default_route("") is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_gloo_is_told_unless_the_user_has(monkeypatch):
    with patch.dict(os.environ):
        os.environ.pop(GLOO_VARIABLE, None)
        set_gloo_interface("there.is.no.such.host.invalid")
        set_gloo_interface("")
        assert GLOO_VARIABLE not in os.environ
        set_gloo_interface("127.0.0.1")
        assert os.environ[GLOO_VARIABLE] == "lo"
        os.environ[GLOO_VARIABLE] = "ib7"
        set_gloo_interface("127.0.0.1")
        assert os.environ[GLOO_VARIABLE] == "ib7"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_on_the_main_node_of_several_its_own_name_is_not_believed(monkeypatch):
    monkeypatch.setattr(network, "own_address_towards", lambda host: "127.0.0.1")
    monkeypatch.setattr(network, "addresses_of_interfaces", lambda: MACHINE)
    monkeypatch.setattr(network, "default_route", lambda routes: "ib0")
    for processes_per_node, interface in (("8", "ib0"), ("16", "lo")):
        with patch.dict(os.environ, {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": processes_per_node}):
            os.environ.pop(GLOO_VARIABLE, None)
            set_gloo_interface("gpu07")
            assert os.environ[GLOO_VARIABLE] == interface
