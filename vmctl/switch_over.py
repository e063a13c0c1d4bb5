"""What a stopped VM wrote to last, when libvirt was killed as it let the VM go on in another file.

libvirt writes the definition last. If the VM has stopped before anybody saw to that, the definition names the file that
it was in before: a copy of which it went on in the new one, or a layer that was merged into what is below it. The
journals say when libvirt was asked for the switch, and when it said that it is done. Between the two nobody can tell
but by what is in the files: while the switch is not done, all that the VM writes comes into both. Where they differ it
is for the user to choose (unclear.py): when they were changed tells little, for libvirt and qemu-img write to them too.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_chain, disk_xml, qemu_img
from vmctl.errors import Conflict, VmctlError
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage


@dataclass(frozen=True, slots=True)
class Doubt:
    """A VM's disk ``target`` is ``told`` by its definition; it may have gone on in ``other``, which differs.

    ``formats`` are theirs. ``running``: the VM, which had stopped, was started from ``told`` since, not by vmctl.
    """

    vm: str
    target: str
    told: str
    other: str
    formats: tuple[str, str]
    running: bool = False

    @property
    def meaning(self) -> str:
        """For people."""
        since = "; it was started from the former since" if self.running else ""
        return (
            f"its disk {self.target} is {self.told}, and it may have gone on in {self.other}: libvirt was cut off as "
            f"it switched over to that{since}"
        )

    @property
    def mend(self) -> str:
        """How the user looks at the two, and chooses."""
        stop = f"vmctl stop {shlex.quote(self.vm)}; " if self.running else ""
        return (
            f"{stop}look at both: vmctl disk map {shlex.quote(self.told)}; vmctl disk map {shlex.quote(self.other)}; "
            "then vmctl doctor --fix --keep FILE lets it start from the one you name; the other one stays too"
        )

    def refusal(self, doing: str) -> Conflict:
        """What is said to who would change or start the VM."""
        return Conflict(f"cannot {doing}: {self.meaning}", hint=self.mend)


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
