"""`wm parity`."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.checks import available_runtimes, require_runtimes
from wm_graph.cli.console import note, print_json, print_table, progress_bar
from wm_graph.errors import ConfigError, InputError
from wm_graph.quiet import quiet_libraries

if TYPE_CHECKING:
    from wm_runtimes.bundle import Bundle
    from wm_runtimes.parity import ParityReport
    from wm_runtimes.report import Report


def command(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="The bundle, or with --html one of each dtype of a model.")],
    runtimes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Runtimes, such as onnxruntime-cpu:model.onnx, onnxruntime-cuda:bodies.  [default: all that run here]"
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random rows, each a prompt and a few decoded tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page: every op, error growth, placement.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of the page's error growth.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Measure how far runtimes are from a float64 oracle.

    Exit code 1 says that one is past its limit.
    """
    from wm_runtimes import open_bundle
    from wm_runtimes.labels import runtime_of

    labels = None if runtimes is None else _labels(runtimes)
    opened = [open_bundle(bundle) for bundle in bundles]
    names = available_runtimes(opened[0] if len(opened) == 1 else None) if labels is None else labels
    require_runtimes([*map(runtime_of, names), "eager"])
    if html is not None:
        _check_file(html)
        written = ["wm", "parity", *map(str, bundles), "--runtimes", ",".join(names), "--draws", str(draws), "--seed", str(seed)]
        line = shlex.join([*written, "--steps", str(steps), "--html", str(html)])
        _write_page(opened, names, (draws, seed, steps), html, line, as_json)
        return
    if len(opened) > 1:
        raise InputError(f"parity: {len(opened)} bundles, expected one; several are compared on a page, by --html FILE")
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_runtimes.parity import FARTHEST, measure_parity

        report = measure_parity(opened[0], names, draws=draws, seed=seed, progress=progress, farthest_prompt=FARTHEST)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    require_passed(report)


def _labels(text: str) -> list[str]:
    """Runtimes separated by commas, some with one of their ways behind a colon."""
    from wm_runtimes import RUNTIMES
    from wm_runtimes.labels import split_label

    labels = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not labels:
        raise ConfigError(f"no runtime named; choose from {', '.join(RUNTIMES)}")
    for label in labels:
        split_label(label)
    return labels


def _check_file(html: Path) -> None:
    """Refuse a file that cannot be written, before minutes are spent on measuring."""
    if html.is_dir():
        raise InputError(f"{html}: is a folder, expected a file to write; name it, such as {html / 'parity.html'}")
    if not html.absolute().parent.is_dir():
        raise InputError(f"{html}: its folder does not exist; make it first, or name another file")


def _write_page(bundles: Sequence["Bundle"], names: list[str], counts: tuple[int, int, int], html: Path, line: str, as_json: bool) -> None:
    """Measure everything, write the page, then print the tables, or the same numbers as JSON."""
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_runtimes.report import measure_report
        from wm_runtimes.report_page import render_page

        report = measure_report(bundles, names, *counts, progress)
    text = render_page(report, line, _now())
    fresh = html.with_name(f".{html.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, html)
    finally:
        fresh.unlink(missing_ok=True)
    if as_json:
        print_json(report.to_dict())
    else:
        for model in report.models:
            print_report(model)
        print(f"{html}: {len(text.encode()) / 1000:.0f} kB, every op, error growth, placement")
    for item in report.not_run:
        if ", " in item.what and item.what.split(", ")[0] in names:
            note(f"not run: {item.what}: {item.reason}")
    _require_page_passed(report)


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _require_page_passed(report: "Report") -> None:
    from wm_graph.errors import BudgetError

    if not report.passed:
        raise BudgetError(f"{report.name}: out of budget: {'; '.join(report.failures) or 'nothing was compared'}")


def print_report(report: "ParityReport") -> None:
    """The table, and what its columns mean."""
    print(f"{report.bundle}: {report.tokens} tokens in {report.draws} random draws, against the float64 oracle")
    header = ("runtime", "dtype", "R", "limit", "max abs", "limit", "choices differing", "limit", "tok/s", "")
    rows = []
    for row in report.rows:
        distances = (f"{row.R:.3f}", f"{row.R_limit:.3g}", f"{row.max_abs:.2e}", f"{row.max_abs_limit:.2e}")
        choices = (f"{row.choice_rate:.2%}", f"{row.choice_rate_limit:.2%}")
        rows.append([row.runtime, row.dtype, *distances, *choices, f"{row.tokens_per_s:.0f}", "passed" if row.passed else "FAILED"])
    print_table(header, rows, numeric=range(2, 9))
    print("R: rms error of the logits over that of eager PyTorch in the same dtype. tok/s: decoded, all rows of a batch together.")


def require_passed(report: "ParityReport") -> None:
    """Raise for exit code 1 where a runtime is past a limit.

    Raises:
        BudgetError: one is; the message says which and by how much.
    """
    from wm_graph.errors import BudgetError

    failed = [f"{row.runtime} ({', '.join(row.failures) or 'nothing was compared'})" for row in report.rows if not row.passed]
    if failed:
        raise BudgetError(f"{report.bundle}: out of budget: {'; '.join(failed)}")
