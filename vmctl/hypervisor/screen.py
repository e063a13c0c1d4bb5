"""A domain's screen: its picture, and where its VNC server listens."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from vmctl.errors import HypervisorError
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling

_CHUNK = 256 * 1024
PICTURE_MAX = 128 << 20  # a guest chooses its screen's size


@dataclass(frozen=True, slots=True)
class Screen:
    """What a running domain has for a screen. Ports are None where there is none."""

    video: bool
    listen: str
    port: int | None
    websocket: int | None


def _port(text: str | None) -> int | None:
    return int(text) if text and int(text) > 0 else None


def screen(conn: Connection, name: str) -> Screen:
    """The screen of ``name``."""
    root = ET.fromstring(domain.xml(conn, name))
    model = root.find("devices/video/model")
    video = model is not None and model.get("type") != "none"
    vnc = root.find("devices/graphics[@type='vnc']")
    if vnc is None:
        return Screen(video, "", None, None)
    return Screen(video, vnc.get("listen", ""), _port(vnc.get("port")), _port(vnc.get("websocket")))


def picture(conn: Connection, name: str) -> tuple[str, bytes]:
    """The picture on the screen with its MIME type: image/x-portable-pixmap or image/png, as the hypervisor likes."""
    with calling(f"take a picture of VM {name}"):
        stream = conn.handle.newStream()
        kind = domain.handle(conn, name).screenshot(stream, 0)
        data = bytearray()
        try:
            while part := stream.recv(_CHUNK):
                data += part
                if len(data) > PICTURE_MAX:
                    raise HypervisorError(
                        f"cannot take a picture of VM {name}: it is larger than {PICTURE_MAX >> 20} MiB",
                        code=0,
                        domain=0,
                    )
        except BaseException:
            stream.abort()
            raise
        stream.finish()
    return kind, bytes(data)
