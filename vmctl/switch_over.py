"""What a stopped VM wrote to last, when libvirt was killed as it let the VM go on in another file.

libvirt writes the definition last. If the VM has stopped before anybody saw to that, the definition names the file that
it was in before: a copy of which it went on in the new one, or a layer that was merged into what is below it. The
journals say when libvirt was asked for the switch, and when it said that it is done. Between the two nobody can tell
but by what is in the files: while the switch is not done, all that the VM writes comes into both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_chain, disk_xml, qemu_img
from vmctl.errors import Conflict, VmctlError
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage


@dataclass(frozen=True, slots=True)
class Doubt:
    """A stopped VM's disk ``target`` is ``told`` by its definition; it may have gone on in ``other``, which differs.

    ``formats`` are theirs.
    """

    vm: str
    target: str
    told: str
    other: str
    formats: tuple[str, str]

    @property
    def last(self) -> str:
        """The one of them that was written to last."""
        return max(self.other, self.told, key=lambda path: Path(path).stat().st_mtime_ns)

    def refusal(self, doing: str, start_from: str) -> Conflict:
        """What is said to who would change or start the VM; ``start_from``: what doctor would let it start from."""
        return Conflict(
            f"cannot {doing}: its disk {self.target} is {self.told}, and it may have gone on in {self.other}: libvirt "
            "was cut off as it switched over to that",
            hint=f"look at both: vmctl disk map {self.other}; vmctl doctor --fix lets it start from {start_from}",
        )


def below(host: Host, path: str) -> tuple[str, str] | None:
    """The file that a qcow2 is based on, and its format. Raises ImageError, NotFound."""
    base = _chain(host, path, "qcow2").base
    return (base.path, base.format) if base else None


def same(host: Host, one: Doubt) -> bool:
    """Whether a guest would read the same in both."""
    try:
        for path, form in zip((one.told, one.other), one.formats, strict=True):
            _chain(host, path, form)  # qemu-img follows what is named
        what = f"compare {one.told} with {one.other}"
        qemu_img.require_equal(Path(one.told), one.formats[0], Path(one.other), one.formats[1], what=what)
    except VmctlError:
        return False
    return True


def name_other(host: Host, one: Doubt) -> None:
    """Let the definition name the other file."""
    text = domain.xml(host.conn, one.vm, inactive=True)
    domain.define(host.conn, disk_xml.with_source(text, one.target, one.other, one.formats[1]), name=one.vm)


def _chain(host: Host, path: str, form: str) -> disk_chain.Chain:
    return disk_chain.read(path, form, lambda: storage.folders(host.conn), doing=f"read {path}")
