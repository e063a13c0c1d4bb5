"""Reading what create's first-boot options name: files, templates with their variables, a password."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmctl import spec, ui
from vmctl.errors import SpecError, reason


def read_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The public keys in these files, a line each; what is a key itself is taken as it is.

    Raises SpecError, which quotes nothing of what it read: it may be a private key.
    """
    found: list[str] = []
    for one in given:
        if spec.is_private_key(one):
            raise SpecError("cannot use an SSH key: it is a private one; give the public one, or its .pub file")
        if spec.is_public_key(one.strip()):
            found.append(one.strip())
            continue
        text = _text(Path(one), "SSH public key")
        if spec.is_private_key(text):
            beside = f"{one}.pub"
            way = f"give {beside}" if Path(beside).is_file() else f"ssh-keygen -y -f {one} tells its public one"
            raise SpecError(f"cannot use SSH key {one}: it is a private key; {way}")
        lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1)}
        keys = {number: line for number, line in lines.items() if line and not line.startswith("#")}
        if wrong := [number for number, line in keys.items() if not spec.is_public_key(line)] or (
            [1] if not keys else []
        ):
            raise SpecError(f"cannot use SSH key {one}: line {wrong[0]} is not an SSH public key")
        found += keys.values()
    return tuple(found)


def read_text(path: Path | None, what: str) -> str:
    """The content of an optional file, "" without one. An empty one says nothing, which nobody means who gives it."""
    if path is None:
        return ""
    text = _text(path, what)
    if not text.strip():
        raise SpecError(f"cannot use {what} {path}: it is empty")
    return text


def read_user_data(paths: Sequence[Path], variables: Sequence[str], name: str) -> tuple[str, ...]:
    """The parts of user-data. With variables, or when its name ends in .j2, a part is a template; it knows ``name``."""
    values = {"name": name}
    if variables and not paths:
        raise SpecError("cannot use variables: there is no user-data to fill in", hint="--user-data FILE")
    for text in variables:
        key, sep, value = text.partition("=")
        if not sep or not key.isidentifier():
            raise SpecError(f"cannot read variable {text!r}: write it as NAME=VALUE")
        values[key] = value
    parts = []
    for path in paths:
        part = _text(path, "user-data")
        if variables or path.suffix == ".j2":
            from vmctl.render import user_template

            part = user_template(part, values, what=f"user-data {path}")
        parts.append(part)
    return tuple(parts)


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {what} {path}: {reason(error)}") from error


def read_password() -> str:
    """A password from the terminal, asked twice and unseen, or the first line of stdin; as a crypt(5) hash."""
    from vmctl import seed

    with taking_password():
        if ui.interactive():
            import getpass

            password = getpass.getpass("Password: ")
            if password != getpass.getpass("Again: "):
                raise SpecError("cannot take the password: the two differ")
        else:
            password = sys.stdin.readline().rstrip("\n")
        if not password:
            raise SpecError("cannot take an empty password", hint="type it at the prompt, or give it on stdin")
        return seed.password_hash(password)


@contextmanager
def taking_password() -> Iterator[None]:
    """Bytes that are no text, where a password is read or put to use, as bad input."""
    try:
        yield
    except UnicodeError as error:
        raise SpecError("cannot take the password: it is not UTF-8") from error
