"""What every command prints with: tables and JSON on stdout, progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, float], None]


def print_json(value: Any) -> None:
    """One JSON document on stdout, for machines."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """Columns aligned by spaces, which read the same on a terminal and in a file; `numeric` columns are flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = zip(row, widths, strict=True)
        aligned = [cell.rjust(width) if column in numeric else cell.ljust(width) for column, (cell, width) in enumerate(cells)]
        print("  ".join(aligned).rstrip())


def print_fields(fields: dict[str, str]) -> None:
    """Name and value, a line each."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name.ljust(width)}  {value}")


def note(message: str) -> None:
    """A remark on stderr, out of the way of results."""
    print(message, file=sys.stderr)


def human_bytes(count: int) -> str:
    """A size for people: 512 B, 1.5 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_count(count: int) -> str:
    """A number of parameters for people: 512, 11.6 M, 1.21 B."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.{2 if unit == 'B' else 1}f} {unit}"
    return str(count)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr that takes (what is being done, fraction done); silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda text, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, fraction: bar.update(task, description=text, completed=fraction)
