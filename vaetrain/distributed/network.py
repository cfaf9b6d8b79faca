"""Which network interface the processes of several machines reach each other by.

Gloo asks for the address of the host's own name, which on many machines is loopback: other machines then wait for ever.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vaetrain.distributed.launcher_environment import LauncherEnvironment

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"


def set_gloo_interface(main_host: str) -> None:
    """Have gloo use the interface by which this machine reaches the main process's, unless the user has chosen one.

    Raises ValueError where several could be meant.
    """
    own = own_address_towards(main_host)
    if own is None or sys.platform != "linux" or os.environ.get(GLOO_VARIABLE):
        return
    here, routes = LauncherEnvironment.read(), ""
    with suppress(OSError):
        routes = Path("/proc/net/route").read_text()
    interface = choose_interface(
        main_host, own, addresses_of_interfaces(), default_route(routes),
        several_machines=here.num_processes > here.processes_per_node,
    )  # fmt: skip
    if interface is not None:
        os.environ[GLOO_VARIABLE] = interface


def choose_interface(
    main_host: str, own: str, addresses: Mapping[str, str], default: str | None, *, several_machines: bool
) -> str | None:
    """The interface of a machine whose address towards `main_host` is `own`; None if no interface has it.

    `addresses` are those of the interfaces. On the main process's machine its name may mean loopback (Debian's 127.0.1.1),
    over which no other machine is reached: then it is the interface of the `default` route, or the only one there is besides.
    Raises ValueError where neither tells.
    """
    if not several_machines or not is_loopback(own) or means_loopback(main_host):
        return next((name for name, address in addresses.items() if address == own), None)
    outward = [name for name, address in addresses.items() if not is_loopback(address)]
    if default in outward:
        return default
    if len(outward) == 1:
        return outward[0]
    raise ValueError(
        f"{main_host}, the host of the main process, is a loopback address on {socket.gethostname()}, and "
        f"{' or '.join(outward) or 'no interface'} could lead to the other machines: set {GLOO_VARIABLE} to the one that does, or "
        "give the host by an address that the others reach it by (--main_process_ip)"
    )


def is_loopback(address: str) -> bool:
    """Whether an IPv4 address reaches this machine alone."""
    return address.startswith("127.")


def means_loopback(host: str) -> bool:
    """Whether a host was written as this very machine: all processes are meant to be on it, in trials of several "machines"."""
    return is_loopback(host) or host in ("localhost", "::1")


def own_address_towards(host: str) -> str | None:
    """The IPv4 address that this machine uses towards `host`; None if unknown."""
    if not host:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: connecting a datagram socket only chooses the route
        except OSError:
            return None
        return str(probe.getsockname()[0])


def addresses_of_interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one; none on systems other than Linux."""
    if sys.platform != "linux":
        return {}
    import fcntl  # not on Windows

    get_address = 0x8915  # SIOCGIFADDR, see netdevice(7)
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(asked, get_address, struct.pack("256s", name.encode()))
                addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def default_route(routes: str) -> str | None:
    """The interface of the default route with the lowest metric in the text of /proc/net/route; None if there is none."""
    rows = [line.split() for line in routes.splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) >= 8 and row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else None
