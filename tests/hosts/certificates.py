"""A certificate authority that is thrown away with its testbed, and what it signs for hosts and for the tests' side."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_DAYS = "30"


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def authority(folder: Path) -> None:
    """Its key and certificate."""
    folder.mkdir()
    _key(folder / "ca.key")
    _openssl(
        *("req", "-x509", "-new", "-key", str(folder / "ca.key"), "-out", str(folder / "ca.pem"), "-days", _DAYS),
        *("-subj", "/CN=testbed", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )


def _key(path: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))


def _signed(authority: Path, name: str, names: str, into: Path) -> None:
    """A key and a certificate ``into``/key.pem and cert.pem, for both ends of a connection."""
    _key(into / "key.pem")
    request, extensions = into / "request", into / "extensions"
    _openssl("req", "-new", "-key", str(into / "key.pem"), "-out", str(request), "-subj", f"/CN={name}")
    usage = "keyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth,clientAuth\n"
    extensions.write_text(f"{usage}subjectAltName={names}\n")
    _openssl(
        *("x509", "-req", "-in", str(request), "-out", str(into / "cert.pem"), "-days", _DAYS),
        *("-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca.key"), "-CAcreateserial"),
        *("-extfile", str(extensions)),
    )
    request.unlink()
    extensions.unlink()


def host(authority: Path, pki: Path, name: str, address: str) -> None:
    """What libvirtd and QEMU want of /etc/pki, one certificate for all of it."""
    for part in ("CA", "libvirt/private", "qemu"):
        (pki / part).mkdir(parents=True)
    made = pki / "made"
    made.mkdir()
    _signed(authority, name, f"DNS:{name},IP:{address}", made)
    shutil.copy(authority / "ca.pem", pki / "CA/cacert.pem")
    shutil.copy(authority / "ca.pem", pki / "qemu/ca-cert.pem")
    for end in ("server", "client"):
        shutil.copy(made / "cert.pem", pki / f"libvirt/{end}cert.pem")
        shutil.copy(made / "key.pem", pki / f"libvirt/private/{end}key.pem")
        shutil.copy(made / "cert.pem", pki / f"qemu/{end}-cert.pem")
        shutil.copy(made / "key.pem", pki / f"qemu/{end}-key.pem")
    for path in (pki / "qemu").iterdir():
        path.chmod(0o644)  # QEMU's own user reads them
    shutil.rmtree(made)


def client(authority: Path, folder: Path, names: Mapping[str, str]) -> None:
    """A ``pkipath`` for the tests' side."""
    folder.mkdir()
    _signed(authority, "client", ",".join(f"DNS:{name}" for name in names), folder)
    (folder / "cert.pem").rename(folder / "clientcert.pem")
    (folder / "key.pem").rename(folder / "clientkey.pem")
    shutil.copy(authority / "ca.pem", folder / "cacert.pem")
