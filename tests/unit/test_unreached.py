"""What is told of a host that is not reached: how far the way leads, by words of OpenSSH and libvirt."""

from __future__ import annotations

import pytest

from vmctl.unreached import Cause, cause, mend, peer_mend

_SSH = "Cannot recv data: ssh: connect to host 10.98.0.12 port 22: {}: Connection reset by peer"
_SAID = {
    _SSH.format("Connection refused"): Cause.REFUSED,
    _SSH.format("Connection timed out"): Cause.SILENCE,
    _SSH.format("No route to host"): Cause.ROUTE,
    _SSH.format("Network is unreachable"): Cause.ROUTE,
    "no answer within 12 s": Cause.SILENCE,
    "Cannot recv data: ssh: Could not resolve hostname nosuch.example: Temporary failure in name resolution: "
    "Connection reset by peer": Cause.NAME,
    "unable to connect to server at '10.98.250.1:16514': Connection refused": Cause.REFUSED,
    "End of file while reading data: virt-ssh-helper: cannot connect to '/var/run/libvirt/libvirt-sock': Failed to "
    "connect socket to '/var/run/libvirt/libvirt-sock': Connection refused: Input/output error": Cause.LIBVIRT,
    "Cannot recv data: Host key verification failed.: Connection reset by peer": Cause.HOST_KEY,
    "Cannot recv data: root@10.98.0.12: Permission denied (publickey).: Connection reset by peer": Cause.LOGIN,
    "End of file while reading data: virt-ssh-helper: cannot connect to '/var/run/libvirt/libvirt-sock': Failed to "
    "connect socket to '/var/run/libvirt/libvirt-sock': Permission denied: Input/output error": Cause.RIGHTS,
    "authentication unavailable: no polkit agent available to authenticate action": Cause.RIGHTS,
    "packet 1416128879 bytes received from server too large, want 33554432": Cause.SHELL,
    "Cannot read CA certificate '/etc/pki/CA/cacert.pem': No such file or directory": Cause.CERTIFICATE,
    "End of file while reading data: : Input/output error": Cause.OTHER,
}


@pytest.mark.parametrize("said", _SAID)
def test_how_far_the_way_leads(said: str) -> None:
    assert cause(said) is _SAID[said]


def test_keys_are_mended_where_keys_are_what_lacks() -> None:
    for said, found in _SAID.items():
        for text in (mend(said, ssh=True), peer_mend(said, ssh=True)):
            keys = found in {Cause.HOST_KEY, Cause.LOGIN}
            assert (" key" in text) is keys or found is Cause.OTHER, (said, text)
        assert peer_mend(said, ssh=False) and bool(mend(said, ssh=False)) is (found is not Cause.OTHER)
