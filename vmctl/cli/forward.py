"""vmctl forward: ports of a guest, here."""

from __future__ import annotations

from typing import Annotated

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, Name, UserOption, note, opened, reporter, until_ctrl_c


def forward(
    name: Name,
    ports: Annotated[list[str], typer.Argument(metavar="[ADDRESS:]PORT:GUESTPORT...", help="Such as 8080:80.")],
    user: UserOption = None,
    connect: ConnectOption = None,
) -> None:
    """Lead ports of this machine, on loopback unless an address is given, to ports of a guest, until Ctrl-C.

    Through the guest's SSH server, so whatever listens on the guest's own loopback is reached. Port 0 here takes a
    free one.
    """
    from vmctl import forward as forwards

    wanted = [forwards.parse(text) for text in ports]
    with opened(connect) as host, forwards.forwarding(host, name, wanted, reporter(), user=user) as running:
        for one in running.served:
            ui.write(f"{one}\n")
        note("Ctrl-C ends")
        with until_ctrl_c():
            running.hold()
