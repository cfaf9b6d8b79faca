"""The JPEG decoder of the extra `fast`, without importing torch."""

try:
    import simplejpeg
except ModuleNotFoundError:
    simplejpeg = None

__all__ = ["simplejpeg"]
