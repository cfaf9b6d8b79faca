"""W&B without a key, a network or a known key ends before any data is opened; its environment is obeyed, and options before it."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.preflight import check_training
from vaetrain.wandb_account import check_wandb


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    for name in (
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_MODE",
        "WANDB_PROJECT",
        "WANDB_CONFIG_DIR",
        "NETRC",
        "WANDB_IDENTITY_TOKEN_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(monkeypatch) -> Iterator[list[int]]:
    """A server that answers with the first of the codes."""
    codes = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(codes[0])
            self.end_headers()
            self.wfile.write(b'{"data": {"viewer": {"id": "x"}}}')

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        yield codes
        listening.shutdown()


def test_without_a_key_it_is_one_line_before_the_data(tmp_path):
    config = parse(Config, None, ["--data.train", str(tmp_path / "not looked at"), "--log.wandb", "online"])
    with pytest.raises(
        ValueError, match=r"--log\.wandb online: no API key for https://api\.wandb\.ai; run `wandb login`"
    ):
        check_training(config)


def test_without_a_network_it_says_so(monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    check_wandb(ask_server=True)
    server[0] = 500  # an answer, that wandb may know what to do with
    check_wandb(ask_server=True)
    server[0] = 401
    with pytest.raises(ValueError, match="does not know the API key"):
        check_wandb(ask_server=True)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    check_wandb(ask_server=False)
    with pytest.raises(
        ValueError, match=r"http://127\.0\.0\.1:9 does not answer \(.*\); mend the network or WANDB_BASE_URL"
    ):
        check_wandb(ask_server=True)


@pytest.mark.parametrize("where", ["netrc", "settings"])
def test_a_key_that_login_left_is_found(tmp_path, server, where):
    if where == "netrc":
        (tmp_path / ".netrc").write_text("machine 127.0.0.1\n  login user\n  password " + "a" * 40 + "\n")
        (tmp_path / ".netrc").chmod(0o600)
    else:
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\napi_key = " + "a" * 40 + "\n")
    check_wandb(ask_server=True)


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        (None, [], ("disabled", "vaetrain")),
        ("offline", [], ("offline", "mine")),
        ("dryrun", [], ("offline", "mine")),
        ("online", ["--log.wandb", "disabled"], ("disabled", "mine")),
        ("disabled", ["--log.wandb", "online", "--log.wandb-project", "yours"], ("online", "yours")),
    ],
)
def test_the_environment_is_obeyed_unless_an_option_says_otherwise(monkeypatch, mode, options, expected):
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_PROJECT", "mine")
    log = parse(Config, None, ["--data.train", "a", *options]).log
    assert (log.wandb, log.wandb_project) == expected


def test_a_mode_that_there_is_not_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(SystemExit):
        parse(Config, None, ["--data.train", "a"])
    said = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert "WANDB_MODE is sometimes; set it to online, offline or disabled" in said
