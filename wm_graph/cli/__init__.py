"""The `wm` command. Importing it is cheap: a command's module and the libraries it needs load when it runs."""

import os
import sys
from collections.abc import Sequence

from wm_graph.errors import WmError

_BUG = 70  # EX_SOFTWARE: neither the user's mistake nor a number out of budget
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run `wm` and leave with its exit code; every expected failure is one line on stderr."""
    code = run(sys.argv[1:] if argv is None else argv)
    # Flushed here, where a closed pipe is still ours to handle.
    if not _flush():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run `wm` with these arguments and return its exit code: 0 done, 1 numbers out of budget, 2 the user's mistake, 3 not available."""
    from wm_graph.cli.app import make_app

    try:
        result = make_app().main(list(argv) or ["--help"], prog_name="wm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print one line for an expected failure and return its exit code; a traceback for anything else."""
    if isinstance(error, WmError):
        return _say(str(error), error.exit_code)
    if hasattr(error, "format_message"):  # typer's usage errors, whose class moved between its versions
        return _say(_usage(error), 2)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return _say("not enough memory; use a smaller model, capacity or batch", 2)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}", 2)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("wm_"):
        return _say(f"the Python package {error.name!r} is missing; `wm doctor` lists what to install", 3)
    import traceback

    traceback.print_exception(error)
    return _say(f"this is a bug in wm-graph ({type(error).__name__}); please report it with the lines above", _BUG)


def _usage(error: Exception) -> str:
    message = str(getattr(error, "format_message")()).rstrip(".")  # noqa: B009 (typer has no public name for the class)
    context = getattr(error, "ctx", None)
    return f"{message}; see `{context.command_path if context else 'wm'} --help`"


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"wm: error: {line}", file=sys.stderr)
    return code


def _flush() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True
