"""The JPEG decoder of the extra `fast`, and what is not given to any decoder. Without importing torch."""

import re

try:
    import simplejpeg
except ModuleNotFoundError:
    simplejpeg = None

__all__ = ["JPEG_SIGNATURE", "refuse_many_scans", "simplejpeg"]

JPEG_SIGNATURE = b"\xff\xd8"
MAX_SCANS = 64
"""Of a progressive JPEG; libjpeg writes 10, mozjpeg tries up to 64. Each of a few bytes takes as long as the picture is large."""

_START_OF_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""In the data of a scan 0 follows 255, or the number of a restart."""


def refuse_many_scans(encoded: bytes | bytearray) -> None:
    """Raise ValueError for a JPEG of more than MAX_SCANS, of which a megabyte would take minutes."""
    if encoded.count(b"\xff\xda") > MAX_SCANS and _num_scans(encoded) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans; save it as a plain JPEG")


def _num_scans(encoded: bytes | bytearray) -> int:
    """Those of the picture, not of small forms of it in its metadata or of what follows it."""
    at, scans = len(JPEG_SIGNATURE), 0
    while found := _MARKER.search(encoded, at):
        at, marker = found.end(), found[1][0]
        if marker == _END:
            break
        scans += marker == _START_OF_SCAN
        if 0x02 <= marker <= 0xBF or (marker >= 0xC0 and marker != 0xD8):
            at += int.from_bytes(encoded[at : at + 2], "big")
    return scans
