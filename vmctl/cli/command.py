"""How commands and groups of vmctl's differ from typer's own: usage, what may follow a name, what mistakes are told."""

from __future__ import annotations

import difflib
from math import isnan
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from vmctl.cli.options import GLOBALS, ConnectOption, EarlyOutputOption, QuietOption, VerboseOption
from vmctl.cli.words import elsewhere
from vmctl.errors import SpecError
from vmctl.ui import Output, Verbosity


def _sets(verbosity: Verbosity) -> Any:
    def chosen(_ctx: Any, _param: Any, wanted: bool) -> None:
        if wanted:
            GLOBALS.verbosity = verbosity

    return chosen


_MOST = 1e9  # seconds, thirty years of them: no thread, and no call of the kernel's, waits for ever by a number
_CLOSE = 0.74  # of difflib: one letter wrong, too many, too few or in the wrong place; "clone" is not "console"


class Group(TyperGroup):
    """Knows what a command is called elsewhere, and which was meant by one that is mistyped."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named. Raises SpecError with the ones that may have been meant."""
        word = args[0]
        if word not in self.commands and word[:1] != "-" and not ctx.resilient_parsing:
            near = [f"{ctx.command_path} {one}" for one in difflib.get_close_matches(word, self.commands, 2, _CLOSE)]
            meant = elsewhere(ctx.command_path, word, self.commands) or near
            raise SpecError(
                f"cannot understand the command line: no such command '{word}'",
                hint=f"did you mean {', or '.join(meant)}?" if meant else f"{ctx.command_path} --help",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the overview, each command with its first sentence, whole."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(400)) for name, one in self.commands.items()])


def group(text: str) -> typer.Typer:
    """A group of commands, with its help."""
    made = typer.Typer(cls=Group, help=text, no_args_is_help=True, rich_markup_mode=None, add_completion=False)
    made.callback()(_between)
    return made


def _between(
    connect: ConnectOption = None,
    output: EarlyOutputOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Take what stands between a group's name and its command's for what stands before both."""
    GLOBALS.connect, GLOBALS.output = connect or GLOBALS.connect, output or GLOBALS.output
    if quiet or verbose:
        GLOBALS.verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE


def _gathering(param: Any) -> None:
    """Let a parameter note a value that it cannot take, and go on as if none had been given."""
    plain = param.process_value

    def process_value(ctx: Any, value: Any) -> Any:
        try:
            found = plain(ctx, value)
            if isinstance(found, float) and isnan(found):  # it is below and above no bound, and no time ever passes it
                raise typer.BadParameter(f"{value!r} is not a number")
            if isinstance(found, float) and found > _MOST:
                raise typer.BadParameter(f"{value!r} is more than {_MOST:.0f}")
            return found
        except typer.BadParameter as error:
            error.ctx, error.param = error.ctx or ctx, error.param or param
            words = error.format_message().rstrip(".")
            GLOBALS.wrong.append(words[:1].lower() + words[1:])
            GLOBALS.missing |= param.required
            return None if param.required else plain(ctx, param.get_default(ctx))

    param.process_value = process_value


class Command(TyperCommand):
    """Takes -q and -v after its name too, where hurried hands put them, and shows arguments without braces.

    All that is wrong with its options is told at once.
    """

    goes_on = False

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        for param in self.params:
            _gathering(param)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse. Raises one usage error with all problems, unless the command adds its own to them."""
        GLOBALS.wrong, GLOBALS.missing = [], False
        if GLOBALS.output is not None and not ctx.resilient_parsing and not {"-h", "--help"} & {*args}:
            if not any(isinstance(param.default, Output) for param in self.params):
                ctx.fail(f"no such option: --output, as {ctx.command_path} has only one form of result")
            ctx.default_map = {"output": GLOBALS.output.value}
        rest: list[str] = super().parse_args(ctx, args)
        if GLOBALS.wrong and (GLOBALS.missing or not self.goes_on) and not ctx.resilient_parsing:
            ctx.fail("; ".join(GLOBALS.wrong))
        return rest

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
                    ("quiet", Verbosity.QUIET, "Only results and errors: no progress, no notes."),
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


class GoesOn(Command):
    """Begins with defaults in place of what its options cannot take, and must tell of GLOBALS.wrong with its own."""

    goes_on = True
