"""One call of libzstd, which is there wherever dpkg is; Python 3.11 has no module for it."""

from __future__ import annotations

import ctypes
from functools import cache

from vmctl.errors import Unsupported

_LEVEL = 3


@cache
def _library() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL("libzstd.so.1")
    except OSError as error:
        raise Unsupported(
            "cannot compress with zstd: libzstd.so.1 is missing", hint="apt-get install libzstd1"
        ) from error
    found.ZSTD_compressBound.restype = found.ZSTD_compress.restype = ctypes.c_size_t
    found.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    found.ZSTD_compress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    found.ZSTD_isError.argtypes = [ctypes.c_size_t]
    return found


def require() -> None:
    """Raise Unsupported where there is none."""
    _library()


def compress(data: bytes) -> bytes:
    """The data as one zstd frame. Other threads go on meanwhile."""
    library = _library()
    room = library.ZSTD_compressBound(len(data))
    packed = ctypes.create_string_buffer(room)
    size = library.ZSTD_compress(packed, room, data, len(data), _LEVEL)
    if library.ZSTD_isError(size):
        raise Unsupported("cannot compress with zstd: it says no")
    return packed.raw[:size]
