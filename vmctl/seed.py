"""The NoCloud seed: a small ISO that tells a guest who it is at its first boot, and the host key planted in it."""

from __future__ import annotations

import io
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmctl.errors import SpecError, VmctlError, reason
from vmctl.locks import held

_KEYGEN_TIMEOUT_S = 20
_LONGEST_PASSWORD = 256  # openssl cuts a longer one off, and says so where nobody looks


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An SSH key pair in OpenSSH's text forms. ``public`` is type and key, without a comment."""

    private: str
    public: str

    def __repr__(self) -> str:
        """Without the private part: reprs reach logs and tracebacks."""
        return f"KeyPair(public={self.public!r})"


def _keygen(path: Path, comment: str) -> None:
    try:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_KEYGEN_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise VmctlError("cannot make an SSH key: ssh-keygen is missing", hint="install openssh-client") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise VmctlError(f"cannot make an SSH key: {error}") from error


def new_host_key(comment: str) -> KeyPair:
    """A fresh ed25519 key pair. It touches the disk only in a private folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmctl-key-") as folder:
        path = Path(folder) / "key"
        _keygen(path, comment)
        public = " ".join(path.with_suffix(".pub").read_text().split()[:2])
        return KeyPair(path.read_text(), public)


def password_hash(password: str) -> str:
    """The password as crypt(5)'s SHA-512, which every Linux guest knows. It never stands in a command line.

    Raises SpecError for one that is too long.
    """
    if len(password.encode()) > _LONGEST_PASSWORD:
        raise SpecError(f"cannot take the password: it is longer than {_LONGEST_PASSWORD} bytes")
    try:
        done = subprocess.run(
            ["openssl", "passwd", "-6", "-stdin"],
            input=password.encode(),
            check=True,
            capture_output=True,
            timeout=_KEYGEN_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise VmctlError("cannot hash the password: openssl is missing", hint="install openssl") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise VmctlError(f"cannot hash the password: {error}") from error
    return done.stdout.decode().strip()


def _make_client_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".key-", dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        _keygen(made, "vmctl")
        public_part(made).rename(public_part(path))
        made.rename(path)  # last: its existence says that both are there


def public_part(key: Path) -> Path:
    """Where ssh-keygen puts the public part of a private key."""
    return key.with_name(f"{key.name}.pub")


def client_key(folder: Path, lock_folder: Path) -> Path:
    """vmctl's own client key of this user, made on first use; the public part is beside it with .pub."""
    path = folder / "id_ed25519"
    if not path.exists():
        with held(lock_folder, f"client key {path}", timeout_s=30):
            if not path.exists():
                try:
                    _make_client_key(path)
                except OSError as error:
                    raise VmctlError(
                        f"cannot keep an SSH key in {folder}: {reason(error)}",
                        hint="are HOME and XDG_DATA_HOME yours and writable?",
                    ) from error
    return path


def public_key(private: Path) -> str:
    """What stands in the file of its public part. Raises SpecError without one."""
    path = public_part(private)
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"cannot read SSH public key {path}: {reason(error)}", hint=f"ssh-keygen -y -f {private} >{path}"
        ) from error


def authorized_keys(client: Path, home: Path) -> tuple[str, ...]:
    """Public keys to let in: of the key to log in with, then the user's others. Raises SpecError without the first."""
    found = [public_key(client).strip()]
    for path in sorted((home / ".ssh").glob("id_*.pub")) if (home / ".ssh").is_dir() else []:
        try:
            found += [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            continue  # an unreadable key of the user's is no reason not to make a VM
    return tuple(dict.fromkeys(found))


def build_iso(files: Mapping[str, str]) -> bytes:
    """The seed, files by name, as an ISO 9660 image with volume id ``cidata`` (cloud-init's NoCloud data source)."""
    import pycdlib  # late: only a create needs it

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=4, vol_ident="cidata", joliet=3, rock_ridge="1.09")
    for name, text in files.items():
        data = text.encode()
        iso.add_fp(io.BytesIO(data), len(data), f"/{name.upper()};1", rr_name=name, joliet_path=f"/{name}")
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()
