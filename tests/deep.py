"""`make test-deep`: every law file again and again, with more examples and another seed each time, until a total is reached.

    python tests/deep.py [--total 30000] [--record build/deep.jsonl] [FILE ...]

A slice is one law file at one seed. Each finished slice is a line of the record: its examples, seconds, failures and the sources that it
ran on. A second call goes on where the first stopped, whatever stopped it. Only slices that passed on the sources as they are now count:
a change of the packages, of the laws or of what the laws import begins the total anew. Slices whose last run failed, on whatever sources,
are run again before anything else. Exit status 0: the total is reached on these sources, and no slice has failed without having passed
since; 1: a slice remains failed, and its examples are printed in the form that repeats them, or the total is not reached; 130: interrupted.

Examples are those of `hypothesis_profiles.law`: they compared two or more implementations, which agreed.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SOURCES = ("wm_graph", "kernels", "export", "runtimes")  # and of tests/ what `law_sources` names
MOST = 8  # times the examples of CI in one slice: some ten minutes


def law_files() -> list[str]:
    """The files of laws, by name."""
    return [*sorted(path.name for path in TESTS.glob("test_laws_*.py")), "test_session_machine.py"]


def rounds(files: Sequence[str]) -> Iterator[list[tuple[str, int, int]]]:
    """Without end: (file, seed, factor) of every file, the factor doubling from round to round up to `MOST`."""
    seed = 0
    while True:
        yield [(name, seed, min(2**seed, MOST)) for name in files]
        seed += 1


def law_sources() -> set[Path]:
    """The law files, conftest.py, and every file of tests/ that the laws import, directly or not."""
    found, todo = {TESTS / "conftest.py"}, [TESTS / name for name in law_files()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in _imported(path):
            module = TESTS / name.replace(".", "/")
            todo += [module.with_suffix(".py")] if module.with_suffix(".py").is_file() else sorted(module.glob("*.py"))
    return found


def _imported(path: Path) -> set[str]:
    """The modules that a file names in its imports."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def sources_digest() -> str:
    """Which sources a slice ran on: all that its outcome depends on, and no more."""
    digest = hashlib.sha256()
    packages = {path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    for path in sorted(packages | law_sources()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read(record: Path) -> list[dict[str, Any]]:
    """The slices recorded so far; a last line that was cut off is left out."""
    lines = record.read_text().splitlines() if record.exists() else []
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise SystemExit(f"{record}: line {number + 1} is not JSON; repair or remove the file") from None
            record.write_text("".join(f"{whole}\n" for whole in lines[:-1]))
    return found


def passed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slices that passed on the sources as they are now, the last run of each."""
    sources = sources_digest()
    last = {(line["slice"], line["seed"]): line for line in lines if line["sources"] == sources}
    return [line for line in last.values() if not line["failures"]]


def failed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slices whose last run failed, on whatever sources; those of law files that are gone apart."""
    last = {(line["slice"], line["seed"]): line for line in lines if line["slice"] in law_files()}
    return [line for line in last.values() if line["failures"]]


def total_of(lines: Sequence[dict[str, Any]]) -> int:
    """Examples of all slices that passed on the sources as they are now."""
    return sum(sum(line["examples"].values()) for line in passed(lines))


def run_slice(name: str, seed: int, factor: int, folder: Path) -> dict[str, Any]:
    """Run one slice in a process of its own, and say how it went."""
    counts, report = folder / "counts.json", folder / "report.xml"
    for path in (counts, report):
        path.unlink(missing_ok=True)
    variables = {"WM_DEEP": str(factor), "WM_COUNTS": str(counts), "WM_POOL": str(folder / "pool")}
    options = ["--hypothesis-seed", str(seed), "-p", "no:cacheprovider", "--show-capture=no", "--junitxml", str(report)]
    started, sources = time.monotonic(), sources_digest()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / name), *options],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    failures = failures_of(report) if report.exists() else []
    if done.returncode and not failures:
        failures = [{"test": name, "reproduce": f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"}]
    return {
        "slice": name,
        "seed": seed,
        "factor": factor,
        "examples": json.loads(counts.read_text()) if counts.exists() else {},
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
        "sources": sources if sources == sources_digest() else "changed while it ran",
    }


def failures_of(report: Path) -> list[dict[str, str]]:
    """Test and reproducing lines of every failure in a JUnit report."""
    found = []
    for case in ET.parse(report).iter("testcase"):
        for failure in [*case.iter("failure"), *case.iter("error")]:
            found.append({"test": f"{case.get('classname')}::{case.get('name')}", "reproduce": reproducing(failure.text or "")})
    return found


def reproducing(text: str) -> str:
    """What hypothesis says of a failing example, the error above it included; without one, the end of the text."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]  # pytest's mark of what was raised
    starts = [number for number, line in enumerate(errors) if re.match("(Failing test case|Falsifying example)", line)]
    return "\n".join([errors[0], *errors[starts[0] :]] if starts else text.splitlines()[-20:])[:4000]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run slices until the total is reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", help="law files of tests/; all by default")
    parser.add_argument("--total", type=int, default=30_000, help="examples to reach, those of earlier calls included")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "deep.jsonl")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.files) - set(law_files())):
        parser.error(f"{unknown[0]} is no law file; choose from {', '.join(law_files())}")
    options.record.parent.mkdir(parents=True, exist_ok=True)
    lines = read(options.record)
    try:
        with tempfile.TemporaryDirectory(prefix="wm-deep-") as folder:
            _search(options.files or law_files(), options.total, options.record, lines, Path(folder))
    except KeyboardInterrupt:
        print(f"interrupted at {total_of(lines)} examples on these sources; the next call goes on from there", flush=True)
        return 130
    remaining = ", ".join(f"{line['slice']} seed {line['seed']}" for line in failed(lines))
    print(
        f"deep: {total_of(lines)} examples in {len(passed(lines))} slices on these sources, of {options.total}; "
        f"slices that remain failed: {remaining or 'none'}; record: {options.record}"
    )
    return int(bool(remaining) or total_of(lines) < options.total)


def _search(files: Sequence[str], total: int, record: Path, lines: list[dict[str, Any]], folder: Path) -> None:
    """Append slices to the record and to `lines`: those that failed, then others up to the total, or until a whole round adds nothing."""
    again = {(line["slice"], line["seed"]): line["factor"] for line in failed(lines) if line["slice"] in files}

    def run(name: str, seed: int, factor: int) -> None:
        line = run_slice(name, seed, factor, folder)
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        _tell(line, total_of(lines), total)

    for (name, seed), factor in again.items():
        run(name, seed, factor)
    for slices in rounds(files):
        before = len(lines)
        done = {(line["slice"], line["seed"]) for line in passed(lines)} | set(again)
        for name, seed, factor in slices:
            if total_of(lines) >= total:
                return
            if (name, seed) not in done:
                run(name, seed, factor)
        if len(lines) > before and not total_of(lines[before:]):
            return


def _tell(line: dict[str, Any], reached: int, total: int) -> None:
    examples = sum(line["examples"].values())
    verdict = f"{len(line['failures'])} FAILED" if line["failures"] else "passed"
    print(f"{line['slice']} seed {line['seed']}: {examples} examples in {line['seconds']} s, {verdict}; {reached} of {total}", flush=True)
    for failure in line["failures"]:
        print(f"--- {failure['test']}\n{failure['reproduce']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
