"""How a command of vmctl's differs from typer's own: in its usage line, and in what may follow its name."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

from vmctl.cli.options import GLOBALS
from vmctl.ui import Verbosity


def _sets(verbosity: Verbosity) -> Any:
    def chosen(_ctx: Any, _param: Any, wanted: bool) -> None:
        if wanted:
            GLOBALS.verbosity = verbosity

    return chosen


class Command(TyperCommand):
    """Takes -q and -v after its name too, where hurried hands put them, and shows arguments without braces."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters with the global ones, which only `vmctl --help` shows."""
        return [
            *super().get_params(ctx),
            *(
                TyperOption(
                    param_decls=[f"--{name}", f"-{name[0]}"],
                    is_flag=True,
                    type=bool,
                    default=False,
                    hidden=True,
                    expose_value=False,
                    callback=_sets(verbosity),
                )
                for name, verbosity in (("quiet", Verbosity.QUIET), ("verbose", Verbosity.VERBOSE))
            ),
        ]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line."""
        return [piece[1:-1] if piece[:1] == "{" else piece for piece in super().collect_usage_pieces(ctx)]
