"""What makes an image a Vagrant box for the libvirt provider: its metadata, its Vagrantfile, and a way to log in."""

from __future__ import annotations

import json

from vmctl import render, seed
from vmctl.manifest import Manifest

SEED_NAME = "seed.img"
_USER = "vagrant"
# The key every Vagrant knows and replaces at the first `up`: published in its sources, keys/vagrant.pub.
_INSECURE_KEY = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXevct1"
    "YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pz"
    "C6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyL"
    "bIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key"
)
# The driver is left to the Vagrantfile of the lab, which can ask `vmctl host info`; libvirt's own default is KVM.
_VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  config.ssh.username = "{user}"
  config.vm.synced_folder ".", "/vagrant", type: "rsync", disabled: true
  config.vm.provider :libvirt do |libvirt|
    libvirt.disk_bus = "virtio"
  end
end
"""


def seeded(manifest: Manifest) -> bool:
    """Whether the box gets a second disk with a NoCloud seed, from which cloud-init makes Vagrant's user."""
    return manifest.first_boot == "cloud-init"


def seed_iso() -> bytes:
    """The seed of every machine made from a box: Vagrant's user with Vagrant's key, which `vagrant up` replaces."""
    view = render.SeedView(instance_id="vagrant-box", hostname=_USER, ssh_keys=(_INSECURE_KEY,), user=_USER)
    return seed.build_iso({"user-data": render.user_data(view), "meta-data": render.meta_data(view)})


def metadata(manifest: Manifest) -> bytes:
    """metadata.json: the first layout, which every vagrant-libvirt reads, with the list of the second beside it."""
    gib = -(-manifest.virtual_size // (1 << 30))
    values: dict[str, object] = {"provider": "libvirt", "format": "qcow2", "virtual_size": gib}
    if seeded(manifest):
        values["disks"] = [{"path": name, "format": "qcow2"} for name in ("box.img", SEED_NAME)]
    return json.dumps(values).encode()


def vagrantfile(manifest: Manifest) -> bytes:
    """The box's own Vagrantfile."""
    return _VAGRANTFILE.format(user=_USER if seeded(manifest) else manifest.default_user).encode()
