"""Storage pools and volumes, through libvirt, so that remote hosts work like the local one."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import libvirt

from vmctl.errors import Conflict, NotFound, WrongState, close_to
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling, translated
from vmctl.order import natural
from vmctl.wait import wait_until

CHUNK = 1 << 20
_REFRESH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume: its pool, format, sizes in bytes, and its backing file's path ("" if none).

    ``physical`` is the length of its file, whatever is in it; 0 where libvirt does not tell.
    ``path`` is the one on the host; of a volume that Ceph has, its address.
    """

    pool: str
    name: str
    path: str
    format: str
    capacity: int
    allocation: int
    backing: str
    physical: int = 0


def look_up(conn: Connection, pool: str) -> Any:
    """libvirt's own object, for this room only. Raises NotFound with the name that may have been meant."""
    try:
        return conn.handle.storagePoolLookupByName(pool)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        message = f"cannot find storage pool {pool}: {conn.uri} has none of that name"
        meant = close_to(pool, _pool_names(conn, 0))
        raise NotFound(message, meant=meant, hint="vmctl disk pool list") from None


def _volume(conn: Connection, pool: str, name: str) -> Any:
    return look_up(conn, pool).storageVolLookupByName(name)


def ensure_pool(conn: Connection, pool: str, xml: Callable[[], str]) -> None:
    """Make sure a pool called ``pool`` runs; ``xml`` gives the definition of one that does not exist."""
    with calling(f"prepare storage pool {pool}"):
        try:
            found = look_up(conn, pool)
        except NotFound:
            found = _define_pool(conn, pool, xml())
        if not found.isActive():
            _tolerating_running(found, lambda: found.create(libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD))


def _define_pool(conn: Connection, pool: str, xml: str) -> Any:
    try:
        found = conn.handle.storagePoolDefineXML(xml, 0)
    except libvirt.libvirtError:
        # Another vmctl may have defined it between our look and our call.
        return look_up(conn, pool)
    found.setAutostart(1)
    return found


def _tolerating_running(pool: Any, act: Callable[[], object]) -> None:
    try:
        act()
    except libvirt.libvirtError:
        if not pool.isActive():
            raise


def pool_exists(conn: Connection, pool: str) -> bool:
    """Whether the pool is there and runs."""
    with calling(f"look up storage pool {pool}"):
        try:
            return bool(look_up(conn, pool).isActive())
        except NotFound:
            return False


def pool_path(conn: Connection, pool: str) -> str:
    """The folder of a directory pool."""
    with calling(f"read storage pool {pool}"):
        return ET.fromstring(look_up(conn, pool).XMLDesc()).findtext("target/path") or ""


class Space(NamedTuple):
    """Bytes of a pool's file system."""

    capacity: int
    available: int


def running_path(conn: Connection, pool: str) -> str:
    """The folder of a pool that runs; "" where there is none of that name."""
    with calling(f"read storage pool {pool}"):
        try:
            found = look_up(conn, pool)
            return ET.fromstring(found.XMLDesc()).findtext("target/path") or "" if found.isActive() else ""
        except NotFound:
            return ""


def pool_space(conn: Connection, pool: str) -> Space:
    """How large a pool is and how much of it is free; as old as its last refresh."""
    with calling(f"read storage pool {pool}"):
        info = look_up(conn, pool).info()
    return Space(int(info[1]), int(info[3]))


def pools(conn: Connection) -> tuple[tuple[str, str, str, int, int], ...]:
    """Name, state (active or inactive), folder, capacity and free bytes of every pool."""
    found = []
    with calling("list storage pools"):
        for pool in conn.handle.listAllStoragePools(0):
            path = ET.fromstring(pool.XMLDesc()).findtext("target/path") or ""
            state, (_, capacity, _, available) = "active" if pool.isActive() else "inactive", pool.info()
            found.append((str(pool.name()), state, path, int(capacity), int(available)))
    return tuple(sorted(found))


def refresh(conn: Connection, pool: str, *, timeout_s: float = _REFRESH_TIMEOUT_S) -> None:
    """Look at the pool's folder again. libvirt refuses while a volume is being made: wait for that, bounded."""
    with calling(f"refresh storage pool {pool}"):
        found = look_up(conn, pool)
    _refresh(found, pool, timeout_s)


def _refresh(found: Any, pool: str, timeout_s: float = _REFRESH_TIMEOUT_S) -> None:
    def attempt() -> bool:
        try:
            found.refresh()
        except libvirt.libvirtError as error:
            if error.get_error_code() in {libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_OPERATION_INVALID}:
                return False
            raise translated(error, f"refresh storage pool {pool}") from error
        return True

    wait_until(attempt, what=f"refresh of storage pool {pool}", timeout_s=timeout_s, interval_s=0.05)


class Listing(NamedTuple):
    """What is in a pool, after a fresh look: the names of its volumes, and its space."""

    names: frozenset[str]
    space: Space


def listing(conn: Connection, pool: str) -> Listing:
    """Look at a pool again. Raises NotFound."""
    with calling(f"list storage pool {pool}"):
        found = look_up(conn, pool)
        _refresh(found, pool)
        names, info = found.listVolumes(), found.info()
    return Listing(frozenset(names), Space(int(info[1]), int(info[3])))


def volume_names(conn: Connection, pool: str) -> tuple[str, ...]:
    """Names of all volumes in the pool; one call."""
    with calling(f"list storage pool {pool}"):
        return tuple(sorted(look_up(conn, pool).listVolumes(), key=natural))


def volumes(conn: Connection, pool: str) -> tuple[VolumeFacts, ...]:
    """All volumes of the pool with their facts."""
    with calling(f"list storage pool {pool}"):
        return _all_facts(look_up(conn, pool))


def _all_facts(pool: Any) -> tuple[VolumeFacts, ...]:
    """Facts of a pool's volumes, by name, but for those deleted since they were listed."""
    found = []
    for volume in pool.listAllVolumes():
        try:
            found.append(_facts(pool.name(), volume))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise
    return tuple(sorted(found, key=lambda one: natural(one.name)))


def _place(volume: Any, path: str) -> str:
    """A volume's path; the address of one that Ceph has, whose path begins at the cluster."""
    if path.startswith("/"):
        return path
    pool = ET.fromstring(volume.storagePoolLookupByVolume().XMLDesc())
    host = pool.find("source/host")
    if pool.get("type") != "rbd" or host is None:
        return path
    name = host.get("name", "")
    return f"rbd://{f'[{name}]' if ':' in name else name}:{host.get('port', '6789')}/{path}"


def _facts(pool: str, volume: Any) -> VolumeFacts:
    root = ET.fromstring(volume.XMLDesc())
    form = root.find("target/format")
    return VolumeFacts(
        pool=pool,
        name=volume.name(),
        path=_place(volume, root.findtext("target/path") or ""),
        format="raw" if form is None else form.get("type", "raw"),
        capacity=int(root.findtext("capacity") or 0),
        allocation=int(root.findtext("allocation") or 0),
        backing=root.findtext("backingStore/path") or "",
        physical=int(root.findtext("physical") or 0),
    )


def volume(conn: Connection, pool: str, name: str) -> VolumeFacts:
    """Facts of one volume. Raises NotFound."""
    with calling(f"look up volume {name}"):
        return _facts(pool, _volume(conn, pool, name))


def create_volume(conn: Connection, pool: str, xml: str, *, name: str) -> str:
    """Make a volume from XML and return its path. Raises Conflict when the name is taken."""
    with calling(f"create volume {name}"):
        try:
            return str(look_up(conn, pool).createXML(xml, 0).path())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_STORAGE_VOL_EXIST:
                raise Conflict(f"cannot create volume {name}: pool {pool} has it already") from error
            raise


def delete_volume(conn: Connection, pool: str, name: str) -> bool:
    """Delete a volume; False when it was not there."""
    with calling(f"delete volume {name}"):
        try:
            _volume(conn, pool, name).delete(0)
        except NotFound:
            return False
        except libvirt.libvirtError as error:
            if error.get_error_code() in {libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_ERR_NO_STORAGE_POOL}:
                return False
            raise
    return True


def resize_volume(conn: Connection, pool: str, name: str, size: int) -> None:
    """Give a volume that nobody uses a larger capacity."""
    with calling(f"resize volume {name}"):
        _volume(conn, pool, name).resize(size, 0)


@contextmanager
def _stream(conn: Connection) -> Iterator[Any]:
    stream = conn.handle.newStream(0)
    try:
        yield stream
        stream.finish()
    except BaseException:
        with suppress(libvirt.libvirtError):  # it may have broken by itself; the first error is the one to tell
            stream.abort()
        raise


def upload(
    conn: Connection, pool: str, name: str, source: IO[bytes], size: int, moved: Callable[[int], None] = lambda _n: None
) -> None:
    """Fill a volume from ``source``; ``moved`` hears how many bytes have gone so far."""
    with calling(f"upload volume {name}"):
        _upload(conn, _volume(conn, pool, name), name, source, size, moved)


def _upload(
    conn: Connection, volume: Any, name: str, source: IO[bytes], size: int, moved: Callable[[int], None]
) -> None:
    with _stream(conn) as stream:
        volume.upload(stream, 0, size, 0)
        sent = 0
        while chunk := source.read(CHUNK):
            view = memoryview(chunk)
            while view:
                count = stream.send(bytes(view[: 256 * 1024]))
                if count < 0:
                    raise NotFound(f"cannot upload volume {name}: the stream ended early")
                view = view[count:]
                sent += count
            moved(sent)


@contextmanager
def passing(conn: Connection, pool: str, xml: str, name: str, data: bytes) -> Iterator[None]:
    """A small volume with that content, for the time of the block."""
    with calling(f"create volume {name}"):
        volume = look_up(conn, pool).createXML(xml, 0)
    try:
        with calling(f"upload volume {name}"):
            _upload(conn, volume, name, io.BytesIO(data), len(data), lambda _n: None)
        yield
    finally:
        with suppress(libvirt.libvirtError):
            volume.delete(0)


def upload_bytes(conn: Connection, pool: str, name: str, data: bytes) -> None:
    """Fill a small volume."""
    upload(conn, pool, name, io.BytesIO(data), len(data))


def read(
    conn: Connection,
    pool: str,
    name: str,
    sink: Callable[[bytes], object],
    moved: Callable[[int], None] = lambda _n: None,
) -> None:
    """Hand the content of a volume to ``sink``, piece by piece; ``moved`` hears how much has come. Raises NotFound."""
    done = 0
    with calling(f"read volume {name}"):
        volume = _volume(conn, pool, name)
        with _stream(conn) as stream:
            volume.download(stream, 0, 0, 0)
            while chunk := stream.recv(256 * 1024):
                sink(chunk)
                done += len(chunk)
                moved(done)


def transfer(
    source: Connection, there: tuple[str, str], target: Connection, here: tuple[str, str], moved: Callable[[int], None]
) -> str:
    """Fill a volume (pool and name) with the bytes of one on another host; the SHA-256 of what was sent."""
    import hashlib

    digest, done = hashlib.sha256(), 0
    with calling(f"copy volume {there[1]}"), _stream(source) as reading, _stream(target) as writing:
        size = volume_size(source, *there)
        _volume(source, *there).download(reading, 0, size, 0)
        _volume(target, *here).upload(writing, 0, size, 0)
        while chunk := reading.recv(256 * 1024):
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[writing.send(bytes(view)) :]
            done += len(chunk)
            moved(done)
    return digest.hexdigest()


def volume_size(conn: Connection, pool: str, name: str) -> int:
    """The length of a volume's file, whatever is in it."""
    with calling(f"look up volume {name}"):
        info = _volume(conn, pool, name).infoFlags(libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)
    return int(info[2])


def sha256(conn: Connection, pool: str, name: str) -> str:
    """Of a volume's bytes, read through libvirt."""
    import hashlib

    digest = hashlib.sha256()
    read(conn, pool, name, digest.update)
    return digest.hexdigest()


def download(conn: Connection, pool: str, name: str) -> bytes:
    """The whole content of a (small) volume. Raises NotFound."""
    parts: list[bytes] = []
    read(conn, pool, name, parts.append)
    return b"".join(parts)


def tail(conn: Connection, pool: str, name: str, *, limit: int) -> bytes:
    """At most the last ``limit`` bytes of a volume that grows outside libvirt's sight, such as a console log."""
    try:
        path = Path(pool_path(conn, pool)) / name if conn.local else None
        if path is not None:
            with path.open("rb") as log:
                log.seek(max(0, path.stat().st_size - limit))
                return log.read()
    except OSError:
        pass  # not ours to read: libvirt can
    return download(conn, pool, name)[-limit:]


def all_volumes(conn: Connection) -> tuple[VolumeFacts, ...]:
    """The volumes of all pools that run, after a fresh look."""
    found: list[VolumeFacts] = []
    with calling("list storage pools"):
        running = conn.handle.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE)
    for pool in running:
        try:
            _refresh(pool, pool.name())
            with calling(f"list storage pool {pool.name()}"):
                found += _all_facts(pool)
        except (NotFound, WrongState):
            if _runs(pool):
                raise
    return tuple(found)


def _runs(pool: Any) -> bool:
    """Whether a pool is still there, and active."""
    try:
        return bool(pool.isActive())
    except libvirt.libvirtError:
        return False


def sleeping_folders(conn: Connection) -> tuple[str, ...]:
    """The folders of pools that do not run, in which libvirt does not look."""
    names = _pool_names(conn, libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_INACTIVE)
    return tuple(path for path in (pool_path(conn, name) for name in names) if path)


def folders(conn: Connection) -> tuple[str, ...]:
    """The folders of all pools that have one."""
    with calling("list storage pools"):
        found = [ET.fromstring(pool.XMLDesc()) for pool in conn.handle.listAllStoragePools(0)]
    paths = [root.findtext("target/path") or "" for root in found if root.get("type") in {"dir", "fs", "netfs"}]
    return tuple(path for path in paths if path)


def _pool_names(conn: Connection, flags: int) -> tuple[str, ...]:
    with calling("list storage pools"):
        return tuple(pool.name() for pool in conn.handle.listAllStoragePools(flags))
