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
        """Its parameters with the global ones."""
        return [
            *super().get_params(ctx),
            *(
                TyperOption(
                    param_decls=[f"--{name}", f"-{name[0]}"],
                    is_flag=True,
                    type=bool,
                    default=False,
                    help=text,
                    expose_value=False,
                    callback=_sets(verbosity),
                )
                for name, verbosity, text in (
                    ("quiet", Verbosity.QUIET, "No progress, only results, notes and errors."),
                    ("verbose", Verbosity.VERBOSE, "More progress."),
                )
            ),
        ]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line."""
        return [piece[1:-1] if piece[:1] == "{" else piece for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options, those of a panel under its name; the arguments before them."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            if (shown := param.get_help_record(ctx)) is None:
                continue
            panel = "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None)
            panels.setdefault(panel or "Options", []).append(shown)
        for name, rows in sorted(panels.items(), key=lambda item: item[0] == "Options"):
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)
