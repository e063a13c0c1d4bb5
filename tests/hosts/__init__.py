"""Several libvirt hosts on this one machine, in namespaces: for migration, and for what goes wrong with it.

    with booted(3, shared=True) as bed:       # or the pytest fixture `make_testbed`
        first, second, third = bed.machines
        first.ssh_uri, first.tcp_uri, first.tls_uri          # how the tests' side, and the hosts, reach it
        first.run("virsh", "list")                            # a command in it, as root
        first.images                                          # its pool of images, as a folder on the tests' side
        first.limit("50mbit"); first.limit(None)              # tbf, in both directions
        first.slow(delay_ms=30, loss_percent=1); first.slow() # each way; a relay in place of netem
        first.cut(); first.mend()                             # its cable
        first.cut_from(second); first.mend_from(second)       # only what goes between the two
        first.kill("libvirtd", signal.SIGSTOP)                # libvirtd, virtlogd, sshd, or qemu:VM
        first.start("libvirtd")
        first.resize_disk("200M")                             # /var/lib/libvirt is a file system of its own
        first.lose_power(); first.boot()                      # its disk, definitions and host keys stay

By hand: `sudo python -m tests.hosts up 3 [--shared] [--tls] [-- COMMAND...]` gives a shell in a test host beside them.

Each host has its own mount, network, UTS, IPC and pid namespaces, host name (h1, h2 …), host UUID, machine-id, root's
home, sshd with a key that all others have pinned, virtlogd and libvirtd (on its socket, tcp without authentication,
and tls). Guests hang on `lan0`, libvirt network `lan`, one Ethernet with the hosts and the tests' side: 10.98.N.0/24,
.1 the tests' side, .11 the first host, guests from .100 on by DHCP (`bed.guest_address(mac)`). They keep them when they
move.
`shared=True`: /var/lib/libvirt/vmctl, where vmctl's pools lie, is one folder in all of them. libvirt does not take it
for shared (only a network file system is), and asks for --unsafe.

Nothing outlives the process that has it: it is the parent of all hosts, and the kernel ends them with it, by SIGKILL
too. What that leaves (a folder's mounts, a bridge) the next testbed takes away. Several side by side have numbers of
their own.
"""

from tests.hosts.machine import Machine
from tests.hosts.testbed import Testbed, booted

__all__ = ["Machine", "Testbed", "booted"]
