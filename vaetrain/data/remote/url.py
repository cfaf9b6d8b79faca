"""Which shard sets lie behind a URL, without importing torch."""

from __future__ import annotations

from vaetrain.data.format.manifest import MANIFEST_NAME


def remote_folder(location: str, *, allow_pipe: bool = False) -> str | None:
    """The folder of a shard set named by a URL, with its trailing slash, or pipe:COMMAND as it is; None for a path.

    Raises ValueError for a pipe: that was not allowed, or that does not say where a file's name goes.
    """
    if location.partition(":")[0].lower() == "pipe":
        command = location.partition(":")[2]
        if not allow_pipe:
            raise ValueError(
                f"{location} would run the shell command `{command}` on this machine for every file of the shard set; "
                "add --data.allow-pipe True if that is what you want (evaluate.py: --allow-pipe True, verify_shards.py: "
                "--allow-pipe)"
            )
        if "{}" not in command:
            raise ValueError(
                f"{location}: write {{}} in the command where the file's name goes, as in pipe:cat /data/{{}}"
            )
        return location
    if "://" not in location:
        return None
    return location.removesuffix(MANIFEST_NAME).rstrip("/") + "/"
