"""`wm check`."""

from pathlib import Path
from typing import TYPE_CHECKING

from wm_graph.cli.arguments import AsJson, BundlePath, RuntimeNames
from wm_graph.cli.checks import split_names
from wm_graph.cli.console import print_json, print_table, progress_bar
from wm_graph.quiet import quiet_libraries

if TYPE_CHECKING:
    from wm_runtimes.check import CheckReport


def command(
    bundle: BundlePath,
    runtimes: RuntimeNames = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle's files, and its golden logits in runtimes.

    Exit code 2 says that a file is damaged, 1 that a runtime's logits are out of budget.
    """
    from wm_runtimes import RUNTIMES

    report = check(bundle, None if runtimes is None else split_names(runtimes, tuple(RUNTIMES), "runtime"))
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(("checked", "", "found"), [[row.what, "passed" if row.passed else "FAILED", row.detail] for row in report.rows])
        for name, reason in report.unavailable.items():
            print(f"not checked: {name}: {reason}")
    require_intact(report)


def check(bundle: Path, names: list[str] | None) -> "CheckReport":
    """Check under a progress bar; `names` None means every runtime that runs here."""
    from wm_runtimes.check import check_bundle

    with progress_bar() as progress, quiet_libraries():
        return check_bundle(bundle, names, progress)


def require_intact(report: "CheckReport") -> None:
    """Raise for exit code 1 where something failed.

    Raises:
        BudgetError: something did; the message says what.
    """
    from wm_graph.errors import BudgetError

    failed = [f"{row.what} ({row.detail})" for row in report.rows if not row.passed]
    if failed:
        raise BudgetError(f"{report.bundle}: out of budget: {'; '.join(failed)}")
