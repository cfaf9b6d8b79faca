"""Which shard sets lie behind a URL, without importing torch."""

from __future__ import annotations

from vaetrain.data.format.manifest import MANIFEST_NAME


def remote_folder(location: str) -> str | None:
    """The folder of a shard set named by a URL, with its trailing slash; None for a path.

    Raises ValueError for webdataset's pipe:COMMAND, which would run a command of whoever wrote the config.
    """
    if location.partition(":")[0].lower() == "pipe":
        raise ValueError(
            f"{location} would run a shell command, which vaetrain does not; give the shard set's URL (http, s3, gs, hf …) or its "
            "folder"
        )
    if "://" not in location:
        return None
    # Those of HTTP are not fsspec's, and [::1] is a host.
    if "::" in location and not location.lower().startswith(("http://", "https://")):
        raise ValueError(f"{location} chains file systems, some of which write; give the plain URL of the shard set")
    return location.removesuffix(MANIFEST_NAME).rstrip("/") + "/"
