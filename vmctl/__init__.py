"""vmctl: a virtualization manager for real KVM/QEMU hosts, driven through libvirt."""

__version__ = "0.1.0"
