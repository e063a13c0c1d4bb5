"""Certificates by which hosts send VMs to each other encrypted: an authority of the user's own, and what it signs.

A host's key is made on the host and does not leave it. One certificate is both server's and client's, of libvirt's and
of QEMU's (https://libvirt.org/tlscerts.html).
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from vmctl import host_setup, host_ssh
from vmctl.config import HostEntry
from vmctl.errors import NotFound, Unsupported, VmctlError, reason
from vmctl.events import Reporter, Step
from vmctl.fleet import Fleet, called

_AUTHORITY_DAYS, _HOST_DAYS, _RENEW_S = "3650", "800", 60 * 86400
_S = 30.0
_LOOK = """cat /etc/pki/CA/cacert.pem 2>/dev/null; echo '#'
cat /etc/pki/qemu/server-cert.pem 2>/dev/null; echo '#'
openssl pkey -in /etc/pki/qemu/server-key.pem -pubout 2>/dev/null; :"""
_REQUEST = """umask 022; mkdir -p /etc/pki/CA /etc/pki/libvirt /etc/pki/qemu
umask 077; mkdir -p /etc/pki/libvirt/private
key=/etc/pki/libvirt/private/serverkey.pem
[ -s $key ] || { openssl ecparam -name prime256v1 -genkey -noout -out $key.new; mv $key.new $key; }
openssl req -new -key $key -subj /CN=host"""
# QEMU reads its own copies as its own user; the certificate that the next look goes by is put there last.
_INSTALL = """umask 022; cd /etc/pki
put() { printf '%s\\n' "$2" >"$1.new"; mv "$1.new" "$1"; }
put CA/cacert.pem "$1"; put qemu/ca-cert.pem "$1"
umask 077; cp libvirt/private/serverkey.pem libvirt/private/clientkey.pem
for end in server client; do
    cp libvirt/private/serverkey.pem qemu/$end-key.pem
    ! getent passwd libvirt-qemu >/dev/null || chown libvirt-qemu: qemu/$end-key.pem
done
umask 022
for end in client server; do put libvirt/${end}cert.pem "$2"; put qemu/$end-cert.pem "$2"; done"""


def wanted(fleet: Fleet, entry: HostEntry) -> tuple[str, ...]:
    """What is not there yet, in words. Raises Unsupported for a host with certificates of another authority."""
    authority = _folder(fleet) / "ca.pem"
    text = f"TLS certificates for {called(entry)}"
    if not authority.exists():
        text += f", signed by an authority of your own, made in {authority.parent}"
    said = host_setup.as_root(fleet, entry, _LOOK, timeout_s=_S).out
    there, certificate, key, *_ = [*said.split("#\n"), "", "", ""]
    if there.strip() and not (authority.exists() and there.strip() == authority.read_text().strip()):
        raise Unsupported(
            f"cannot give {called(entry)} TLS certificates: it has those of another authority, in /etc/pki",
            hint="they do as well, if the other hosts have theirs of it too; else take /etc/pki/CA/cacert.pem away",
        )
    return () if there.strip() and _good(authority, certificate, key, entry) else (text,)


def _good(authority: Path, certificate: str, key: str, entry: HostEntry) -> bool:
    """Whether a host's certificate is ours, for its key and address, and will be for some time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cert.pem"
        path.write_text(certificate)
        kind = "-verify_ip" if _is_ip(host_ssh.address(entry)) else "-verify_hostname"
        try:
            _openssl("verify", "-CAfile", str(authority), kind, host_ssh.address(entry), str(path))
            _openssl("x509", "-in", str(path), "-noout", "-checkend", str(_RENEW_S))
            return _openssl("x509", "-in", str(path), "-noout", "-pubkey").strip() == key.strip()
        except VmctlError:
            return False


def make(fleet: Fleet, entry: HostEntry, report: Reporter) -> None:
    """Give it what it wants. Raises VmctlError; run again, it goes on."""
    name = called(entry)
    report(Step(f"{name}: TLS certificates"))
    authority = _authority(fleet)
    request = _said(fleet, entry, _REQUEST)
    certificate = _signed(authority, request, entry)
    both = shlex.join([(authority / "ca.pem").read_text().strip(), certificate])
    _said(fleet, entry, f"set -- {both}\n{_INSTALL}")


def _said(fleet: Fleet, entry: HostEntry, script: str) -> str:
    done = host_setup.as_root(fleet, entry, f"set -e\n{script}", timeout_s=_S)
    if done.code:
        words = [line for line in done.err.splitlines() if line.strip()]
        raise VmctlError(f"cannot give {called(entry)} TLS certificates: {words[-1] if words else done.code}")
    return done.out


# --- the authority ----------------------------------------------------------------------------------------------


def _folder(fleet: Fleet) -> Path:
    return fleet.folders.config / "tls"


def _authority(fleet: Fleet) -> Path:
    """Its folder, in which it is made where it is not there yet. Whole: the certificate is what comes last."""
    folder = _folder(fleet)
    if (folder / "ca.pem").exists():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, new = folder / "ca.key", folder / f"ca.{os.getpid()}.new"
        if not key.exists():
            _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(new))
            new.chmod(0o600)
            new.rename(key)
        _openssl(
            *("req", "-x509", "-new", "-key", str(key), "-out", str(new), "-days", _AUTHORITY_DAYS),
            *("-subj", "/CN=vmctl", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
        new.rename(folder / "ca.pem")
    except OSError as error:
        raise VmctlError(f"cannot make an authority for TLS certificates in {folder}: {reason(error)}") from error
    return folder


def _signed(authority: Path, request: str, entry: HostEntry) -> str:
    """A certificate for a request, by the names that others reach the host at."""
    address = host_ssh.address(entry)
    names = dict.fromkeys([address, host_ssh.place(entry.uri).host, called(entry)])
    usage = "keyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth,clientAuth\n"
    alternatives = ",".join(f"{'IP' if _is_ip(name) else 'DNS'}:{name}" for name in names)
    with tempfile.TemporaryDirectory() as folder:
        asked, extensions = Path(folder) / "request", Path(folder) / "extensions"
        asked.write_text(request)
        extensions.write_text(f"{usage}subjectAltName={alternatives}\n")
        return _openssl(
            *("x509", "-req", "-in", str(asked), "-days", _HOST_DAYS, "-extfile", str(extensions)),
            *("-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca.key"), "-set_serial", _serial()),
        ).strip()


def _serial() -> str:
    return f"0x{os.urandom(16).hex()}"


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _openssl(*words: str) -> str:
    try:
        done = subprocess.run(
            ["openssl", *words], capture_output=True, text=True, timeout=_S, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise NotFound("cannot run openssl: it is not installed", hint="Debian: openssl") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise VmctlError(f"cannot use openssl {words[0]}: {lines[-1] if lines else done.returncode}")
    return done.stdout
