"""`wm parity`."""

from typing import TYPE_CHECKING, Annotated

import typer

from wm_graph.cli.arguments import AsJson, BundlePath, RuntimeNames
from wm_graph.cli.checks import available_runtimes, require_runtimes, split_names
from wm_graph.cli.console import print_json, print_table, progress_bar
from wm_graph.quiet import quiet_libraries

if TYPE_CHECKING:
    from wm_runtimes.parity import ParityReport


def command(
    bundle: BundlePath,
    runtimes: RuntimeNames = None,
    draws: Annotated[int, typer.Option(min=1, help="Random rows, each a prompt and a few decoded tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how far runtimes are from a float64 oracle.

    Exit code 1 says that one is past its limit.
    """
    from wm_runtimes import RUNTIMES, open_bundle

    names = available_runtimes() if runtimes is None else split_names(runtimes, tuple(RUNTIMES), "runtime")
    opened = open_bundle(bundle)
    require_runtimes([*names, "eager"])
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_runtimes.parity import measure_parity

        report = measure_parity(opened, names, draws=draws, seed=seed, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    require_passed(report)


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
