"""The group of commands. A command's module is imported when the command is chosen, or when `wm --help` lists them all."""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import wm_graph

# In the order of a first session; command `x` is the function `command` of `x_command.py`.
COMMANDS = (
    "demo",
    "doctor",
    "presets",
    "init",
    "import",
    "upcycle",
    "info",
    "export",
    "check",
    "generate",
    "eval",
    "parity",
    "bisect",
    "bench",
)


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and loads each when asked for it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of a first session."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one command."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            module = import_module(f"wm_graph.cli.{cmd_name}_command")
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(name=cmd_name)(module.command)
            self.commands[cmd_name] = get_command(single)
        return self.commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; a reader that has seen enough, as in `wm presets | head`, is no failure."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(0) from None


def make_app() -> Any:
    """The `wm` command as a typer (click) group."""
    app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(root)
    return get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"wm-graph {wm_graph.__version__}")
        raise typer.Exit


def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Define a model once, export it to a bundle, run it in every runtime and show that the numbers agree.

    A first look: wm demo
    """
