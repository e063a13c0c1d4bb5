"""What a new VM is told at its first boot, and whether its image can act on it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmctl import render, resolve
from vmctl.manifest import Manifest
from vmctl.seed import KeyPair
from vmctl.spec import VM, Boot, Firmware, Nic

_ARCHITECTURE = "x86_64"  # of every VM; the domain's template says it


def static_address(vm: VM) -> str:
    """Where the guest is by its own configuration; "" when the first card's network tells."""
    if not vm.nics or not vm.nics[0].addresses:
        return ""
    return vm.nics[0].addresses[0].partition("/")[0]


def starts_directly(vm: VM, manifest: Manifest) -> bool:
    """Whether the VM's kernel is handed to QEMU, which saves the guest firmware, boot loader and their disk reads.

    Not under UEFI, whose chain of signatures begins on the disk. Not beside a TPM: QEMU (7.2) then puts the initramfs
    over the ACPI tables, for it does not count the TPM's event log among them.
    """
    return vm.boot is Boot.AUTO and "direct" in manifest.boots and vm.firmware is Firmware.BIOS and not vm.tpm


def image_problems(vm: VM, manifest: Manifest) -> list[str]:
    """What is asked of the image that it cannot do."""
    found = []
    if manifest.architecture != _ARCHITECTURE:
        found.append(f"the image is for {manifest.architecture}, and VMs are {_ARCHITECTURE}")
    if vm.firmware not in manifest.boots and not starts_directly(vm, manifest):
        ways = ", ".join("a kernel started directly" if way == "direct" else way for way in manifest.boots)
        where = " beside a TPM" if vm.tpm else " from its disk" if vm.boot is Boot.DISK else ""
        found.append(f"the image does not boot by {vm.firmware}{where}; it boots by {ways}")
    return found if manifest.first_boot == "cloud-init" else found + _seed_problems(vm, manifest)


def _seed_problems(vm: VM, manifest: Manifest) -> list[str]:
    """What is asked of the first boot that nothing in an image without cloud-init can do."""
    from vmctl.user_data import needs_cloud_init

    asked = {
        "a user": vm.user is not None and vm.user != manifest.default_user,
        "a password": bool(vm.password_hash),
        "user-data other than cloud-config": needs_cloud_init(vm.user_data),
        "vendor-data": bool(vm.vendor_data),
        "a network-config": bool(vm.network_config),
        "a static address": any(nic.addresses or nic.nameservers for nic in vm.nics),
    }
    return [f"{what} needs cloud-init, which the image does not have" for what, wanted in asked.items() if wanted]


def seed_files(
    vm: VM, vm_uuid: str, nics: Sequence[Nic], host_key: KeyPair, keys: Iterable[str], manifest: Manifest
) -> dict[str, str]:
    """The files of the NoCloud seed by name. ``nics`` are the cards with the MACs they got."""
    view = render.SeedView(
        instance_id=vm_uuid,
        hostname=vm.name,
        ssh_keys=tuple(dict.fromkeys(keys)),
        host_key_private=host_key.private,
        host_key_public=host_key.public,
        runcmd=vm.runcmd,
        user=vm.user or "",
        password_hash=vm.password_hash,
    )
    files = {"user-data": render.user_data(view), "meta-data": render.meta_data(view)}
    if vm.user_data:
        from vmctl.user_data import combined

        files["user-data"] = combined(files["user-data"], vm.user_data)
    if vm.vendor_data:
        files["vendor-data"] = vm.vendor_data
    if network := vm.network_config or _network_config(vm, vm_uuid, nics, manifest):
        files["network-config"] = network
    return files


def _network_config(vm: VM, vm_uuid: str, nics: Sequence[Nic], manifest: Manifest) -> str:
    """The network-config of several cards or static addresses; "" for one card that asks DHCP, as all guests do."""
    static = any(nic.addresses or nic.nameservers for nic in nics)
    if not static and (len(nics) < 2 or manifest.first_boot != "cloud-init"):
        return ""
    macs = [nic.mac or resolve.mac_address(vm_uuid, position) for position, nic in enumerate(nics)]
    return render.network_config(
        [
            render.CardView(mac, nic.addresses, nic.gateway or "", nic.nameservers)
            for mac, nic in zip(macs, nics, strict=True)
        ]
    )
