"""Which folders of a machine no other one can see, told by its mounts and its exports."""

from __future__ import annotations

import pytest

from vmctl.folder_pools import of_one_machine

MOUNTS = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /srv/nfs rw shared:2 - nfs4 store:/srv rw
31 22 8:1 /data/shared /srv/bound rw master:3 - ext4 /dev/sda1 rw
32 22 0:41 /@home /home rw - btrfs /dev/sdb rw
33 22 8:2 / /srv/with\040space rw - xfs /dev/sdc rw
34 30 0:42 / /srv/nfs/own rw - tmpfs tmpfs rw
35 22 0:43 / /srv/odd rw - fuse.anything x rw
"""


@pytest.mark.parametrize(
    ("folder", "alone"),
    [
        ("/var/lib/libvirt/vmctl", True),
        ("/srv/nfs", False),
        ("/srv/nfs/pool", False),
        ("/srv/nfs/own/pool", True),
        ("/srv/nfs-not", True),
        ("/srv/bound/pool", False),
        ("/home/me", True),
        ("/srv/with space/pool", True),
        ("/srv/odd", False),
    ],
)
def test_by_what_is_mounted(folder: str, alone: bool) -> None:
    assert of_one_machine(MOUNTS, "", folder) is alone


def test_what_is_given_to_others() -> None:
    exports = "/var/lib/libvirt\t10.0.0.0/8(rw,sync)\n/srv/with\\040space/pool\t*(ro)\n"
    assert not of_one_machine(MOUNTS, exports, "/var/lib/libvirt/vmctl")
    assert not of_one_machine(MOUNTS, exports, "/srv/with space")
    assert of_one_machine(MOUNTS, exports, "/var/lib/libvirt-2")
    assert not of_one_machine("", "", "/var"), "nothing is known"
