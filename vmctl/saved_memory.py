"""The head of a file that libvirt saves a running domain's memory in: read, and written for another domain. Pure.

libvirt 0.9 to 9 write it so (src/qemu/qemu_saveimage.h), in the host's byte order:

    16 bytes  magic: "LibvirtQemudSave", or "LibvirtQemudPart" while it is being written
    5 x u32   version (2), length of what follows the header, whether the domain ran, compression (0: none),
              where in it the cookie begins (0: there is none)
    14 x u32  unused
    then      the domain's XML, a NUL, the cookie's XML, a NUL, NULs up to that length
    then      QEMU's own migration stream, to the end of the file

Whatever is not known here is refused: what is restored from a misread head would be another machine's memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmctl.errors import Unsupported, VmctlError

MAGIC = b"LibvirtQemudSave"
_PARTIAL = b"LibvirtQemudPart"
_VERSION = 2
_LAYOUT = struct.Struct("=16s5I56x")
HEADER = _LAYOUT.size
_LONGEST = 16 << 20  # of XML and cookie; a domain's XML has some ten thousand bytes
_ALIGNMENT = 4096
_STREAM_MAGIC = b"QEVM"


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before the memory. ``size`` is where QEMU's stream begins in the file."""

    xml: str
    cookie: str
    was_running: bool
    size: int


def _refused(why: str) -> VmctlError:
    return Unsupported(f"cannot use the saved memory: {why}", hint="it was saved by a libvirt that is not known here")


def length(header: bytes, *, partial: bool = False) -> int:
    """How many bytes of the file are its head, header included, told by its first ``HEADER`` bytes.

    ``partial``: it is still being written. Raises Unsupported for anything but an uncompressed image of the one known
    version.
    """
    if len(header) < HEADER:
        raise _refused("it is cut off in its header")
    magic, version, data, _, compressed, _ = _LAYOUT.unpack_from(header)
    if magic == _PARTIAL and not partial:
        raise _refused("it was not written to its end")
    if magic not in {MAGIC, _PARTIAL}:
        raise _refused("it does not begin as libvirt's files do")
    if version != _VERSION:
        raise _refused(f"its version is {version}, not {_VERSION}")
    if compressed:
        raise _refused(f"it is compressed (kind {compressed})")
    if not 0 < data <= _LONGEST:
        raise _refused(f"its description has {data} bytes")
    return HEADER + int(data)


def parse(head: bytes, *, partial: bool = False) -> Head:
    """The head, of exactly the ``length`` its header tells, with the first bytes of the stream behind it.

    ``partial`` as for ``length``. Raises Unsupported.
    """
    size = length(head, partial=partial)
    if len(head) < size + len(_STREAM_MAGIC):
        raise _refused("it is cut off in its description")
    if head[size : size + len(_STREAM_MAGIC)] != _STREAM_MAGIC:
        raise _refused("QEMU's stream does not begin where its header says")
    _, _, data, was_running, _, cookie_at = _LAYOUT.unpack_from(head)
    if cookie_at > data:
        raise _refused("its cookie lies outside of it")
    body = head[HEADER:size]
    xml = _text(body[: cookie_at or data], "description")
    cookie = _text(body[cookie_at:], "cookie") if cookie_at else ""
    if not xml.lstrip().startswith("<domain"):
        raise _refused("it does not describe a domain")
    return Head(xml, cookie, bool(was_running), size)


def _text(data: bytes, what: str) -> str:
    text, end, _ = data.partition(b"\0")
    if not end:
        raise _refused(f"its {what} has no end")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _refused(f"its {what} is no text") from error


def head(xml: str, cookie: str, *, was_running: bool = True) -> bytes:
    """The head of a file whose stream is to be restored as the domain of ``xml``."""
    described = xml.encode() + b"\0"
    cookie_at = len(described) if cookie else 0
    body = described + (cookie.encode() + b"\0" if cookie else b"")
    body += bytes(-(HEADER + len(body)) % _ALIGNMENT)
    if len(body) > _LONGEST or "\0" in xml or "\0" in cookie:
        raise _refused("its description is too long, or has a NUL in it")
    return _LAYOUT.pack(MAGIC, _VERSION, len(body), int(was_running), 0, cookie_at) + body
