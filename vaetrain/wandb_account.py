"""Weights & Biases as the environment has it: mode, project, key and server. Nothing here imports wandb, which takes a second."""

from __future__ import annotations

import base64
import configparser
import netrc
import os
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vaetrain.http_deadline import Deadline, open_within

SERVER = "https://api.wandb.ai"
WAIT_S = 10.0
"""For the server's answer."""
MODES = {
    "": "disabled", "disabled": "disabled", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online",
}  # fmt: skip
"""WANDB_MODE → --log.wandb."""


def wandb_mode() -> Any:
    """What WANDB_MODE says, or else disabled; raises ValueError where it says none of the modes."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode not in MODES:
        raise ValueError(f"WANDB_MODE is {mode}; set it to online, offline or disabled")
    return MODES[mode]


def wandb_project() -> str:
    """What WANDB_PROJECT says, or else vaetrain."""
    return os.environ.get("WANDB_PROJECT") or "vaetrain"


def check_wandb(*, ask_server: bool) -> None:
    """Refuse what `wandb.init` would, after minutes: no key and no terminal to ask for one, and (`ask_server`) a server that does
    not answer or does not know the key.

    Raises ValueError.
    """
    server = os.environ.get("WANDB_BASE_URL") or _setting("base_url") or SERVER
    key = os.environ.get("WANDB_API_KEY") or _setting("api_key") or _netrc_key(server)
    remedy = "or give --log.wandb offline and `wandb sync` the run later"
    has_token = bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    if not key and not has_token and not sys.stdin.isatty():
        raise ValueError(f"--log.wandb online: no API key for {server}; run `wandb login`, set WANDB_API_KEY, {remedy}")
    if not ask_server:
        return
    headers = {"Content-Type": "application/json"}
    if key and not has_token:
        headers["Authorization"] = f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}"
    request = urllib.request.Request(f"{server.rstrip('/')}/graphql", b'{"query": "query {viewer {id}}"}', headers)
    try:
        open_within(request, Deadline(WAIT_S)).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # any other answer is one, and wandb says what it is about
            raise ValueError(
                f"--log.wandb online: {server} does not know the API key; run `wandb login --relogin`, set WANDB_API_KEY, {remedy}"
            ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"--log.wandb online: {server} does not answer ({reason}); mend the network or WANDB_BASE_URL, {remedy}"
        ) from error


def _setting(name: str) -> str | None:
    """A value from the settings files that `wandb login` and `wandb init` write, the nearer one first."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    for file in (Path("wandb") / "settings", home / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(file)
            if value := parser.get("default", name, fallback=None):
                return value
    return None


def _netrc_key(server: str) -> str | None:
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if found := netrc.netrc(file).authenticators(urlsplit(server).hostname or ""):
                return found[2]
    return None
