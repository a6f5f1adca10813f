"""`make test-mutation`: does a test notice when one operator or number of a reference or of the model is another one?

    python tests/mutation.py [--count 240] [--record build/mutation.jsonl] [--only PART] [--list]

Positions in the code are drawn from a fixed seed, from every file in proportion to the positions it has; at each, one of the mutants that
cosmic-ray makes there. Each mutant is run in a copy of the repository against the file's subset of the tests (`mutation_subsets.SUBSETS`),
which takes at most 15 s of CPU time, and ends at the first failure. Every result is a line of the record: a second call goes on where the
first stopped. A kill stands as long as the mutated file is the same; a survivor is tried again when a test has changed.

Left alone: docstrings, annotations, type aliases, defaults of fields, decorators, `raise` with its message, messages of checks, and
asserts, which narrow types. Operators are exchanged within their kind (arithmetic, bits, order, identity): the others fail at any call.

Writes docs/mutation.md once nothing is left to run. Exit status 0: at least 90 % are killed, and every survivor has its reason in
`mutation_subsets.SURVIVORS`.
"""

import argparse
import ast
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mutation_subsets import SUBSETS, SURVIVORS, sources, subset

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("wm_graph", "kernels", "export", "runtimes", "tests", "pyproject.toml")
PATHS = ("", "kernels", "export", "runtimes", "tests")  # of the packages, and of the plugin of pytest
IMPORTED = ("torch", "torch._dynamo", "onnx", "onnxruntime")  # once for all runs
SEED = 2613
LEAST = 0.9  # share of mutants to kill
SUBSET_SECONDS = 15.0  # CPU time of a subset on the code as it is
TIME_OUT = 180.0  # seconds on the clock; ends a mutant as killed, so a subset must need less than half of it
KINDS = ({"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"}, {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"})
KINDS = (*KINDS, {"Is", "IsNot"}, {"RShift", "LShift"})
PLAIN = {"AddNot", "NumberReplacer", "ZeroIterationForLoop", "ExceptionReplacer"}
PLAIN |= {"ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"}
PLAIN |= {"ReplaceBreakWithContinue", "ReplaceContinueWithBreak"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str  # of the file in the repository
    line: int
    column: int
    text: str  # the whole mutated file
    before: str  # the changed line
    after: str

    @property
    def name(self) -> str:
        """For people; lines move."""
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"

    @property
    def digest(self) -> str:
        """Tells mutants apart, and one that was run from what the file gives today."""
        return hashlib.sha256(f"{self.path}\0{self.text}".encode()).hexdigest()[:16]


@cache
def operators() -> dict[str, Any]:
    """Those of cosmic-ray that are used, by name."""
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    return {name: provider[name]() for name in provider if _used(name)}


def _used(name: str) -> bool:
    if name.startswith("ReplaceUnaryOperator_Delete_"):
        return True
    kind, *ends = name.split("_")
    if kind in ("ReplaceBinaryOperator", "ReplaceComparisonOperator"):
        return any(set(ends) <= members for members in KINDS)
    return name in PLAIN


def left_alone(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of what is not mutated, as (line, column)."""
    tree, lines = ast.parse(source), source.splitlines()
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            found.append(node)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found += [node.annotation] if node.annotation else []
        elif isinstance(node, ast.FunctionDef):
            found += [*node.decorator_list, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.ClassDef):
            found += [*node.decorator_list, *(item for item in node.body if isinstance(item, ast.AnnAssign))]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check_that":
            found += [argument for argument in node.args if isinstance(argument, ast.Lambda)]
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_message"):
            found.append(node)
    aliases = (node for node in tree.body if isinstance(node, ast.Assign))
    found += [node for node in aliases if isinstance(node.value, ast.Subscript | ast.BinOp) and _capital(node.targets[0])]

    def place(line: int, offset: int) -> tuple[int, int]:
        return line, len(lines[line - 1].encode()[:offset].decode())  # ast counts bytes, cosmic-ray characters

    return [(place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)) for node in found]  # type: ignore[attr-defined]


def _capital(target: ast.expr) -> bool:
    """`LayerState`, not `MASK_ELEMENTS`."""
    return isinstance(target, ast.Name) and target.id[:1].isupper() and not target.id.isupper()


Change = tuple[int, str, int]  # number of the node, name of the operator, index among its mutations of the node


def changes_by_position(path: str) -> dict[tuple[int, int], list[Change]]:
    """What cosmic-ray would do to a file at each position where it would do anything, in the order of the file."""
    from cosmic_ray.ast import ast_nodes, get_ast

    source = (ROOT / path).read_text()
    spared = left_alone(source)
    found: dict[tuple[int, int], list[Change]] = {}
    for number, node in enumerate(ast_nodes(get_ast(source))):
        if node.parent is not None and node.parent.type == "parameters":  # `*` and `/` between parameters are no products
            continue
        for name, operator in operators().items():
            for index, (start, _) in enumerate(operator.mutation_positions(node)):
                if not any(low <= start < high for low, high in spared):
                    found.setdefault(start, []).append((number, name, index))
    return dict(sorted(found.items()))


def make(path: str, column: int, change: Change) -> Mutant | None:
    """None where the changed file does not compile or says the same."""
    from cosmic_ray.ast import ast_nodes, get_ast

    source, (number, name, index) = (ROOT / path).read_text(), change
    tree = get_ast(source)
    node = next(node for at, node in enumerate(ast_nodes(tree)) if at == number)
    parent = node.parent
    new = operators()[name].mutate(node, index)
    if new is not node:
        parent.children[parent.children.index(node)] = new
    text = str(tree.get_code())
    try:
        with warnings.catch_warnings(action="ignore"):
            if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)):
                return None
            compile(text, path, "exec")
    except (SyntaxError, ValueError):
        return None
    pairs = zip(source.splitlines(), text.splitlines(), strict=True)
    line, before, after = next((at, *pair) for at, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return Mutant(path, line, column, text, before.strip(), after.strip())


def sample(count: int) -> tuple[list[Mutant], dict[str, int]]:
    """(about `count` mutants at as many positions, number of positions of every file)."""
    pools = {path: changes_by_position(path) for path in sources(ROOT)}
    total = sum(map(len, pools.values()))
    chosen = []
    for path, pool in pools.items():
        generator = random.Random(f"{SEED} {path}")  # of its own: a change of one file leaves the mutants of the others
        places = generator.sample(list(pool), len(pool))
        drawn = (make(path, place[1], change) for place in places for change in generator.sample(pool[place], 1))
        mutants = itertools.islice((mutant for mutant in drawn if mutant is not None), max(1, round(count * len(pool) / total)))
        chosen += sorted(mutants, key=lambda mutant: (mutant.line, mutant.column))
    return chosen, {path: len(pool) for path, pool in pools.items()}


@cache
def tests_digest() -> str:
    """Which tests ran; what is written about survivors is none."""
    files = [path for path in sorted((ROOT / "tests").rglob("*.py")) if not path.name.startswith("mutation")]
    digest = hashlib.sha256("".join(f"{part}\0" for args in SUBSETS.values() for part in args).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Copy:
    """The copy of the repository that is mutated, one file at a time."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for name in COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        self.folder = folder
        self._stamp = int(time.time()) - 10**6

    def run(self, path: str, text: str | None) -> tuple[str, float]:
        """(what came of the subset of a file with another text, or its own: `survived` or how it died, CPU seconds)."""
        file = self.folder / path
        own = file.read_text()
        try:
            self._write(file, own if text is None else text)
            return self._pytest(subset(path))
        finally:
            self._write(file, own)

    def _write(self, file: Path, text: str) -> None:
        file.write_text(text)
        self._stamp += 1  # python takes a cached module by its size and the second of its change: no two are the same
        os.utime(file, (self._stamp, self._stamp))

    def _pytest(self, args: Sequence[str]) -> tuple[str, float]:
        """Run pytest in a fork of this process, which has imported what takes long and none of the project."""
        before, output = _used_seconds(), self.folder / "output.txt"
        run = multiprocessing.get_context("fork").Process(target=_run_pytest, args=(self.folder, output, args))
        run.start()
        run.join(TIME_OUT)
        if run.exitcode is None:
            run.kill()
            run.join()
            return "time-out", _used_seconds() - before
        seconds = _used_seconds() - before
        if run.exitcode == 0:
            return "survived", seconds
        if run.exitcode < 0:
            return f"signal {-run.exitcode}", seconds
        if run.exitcode > 2:
            raise SystemExit(f"pytest ended with status {run.exitcode}: {output.read_text()[-2000:]}")
        said = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", output.read_text(), re.MULTILINE)
        return said[1] if said else "import", seconds


def _run_pytest(folder: Path, output: Path, args: Sequence[str]) -> None:
    """In the fork: everything that pytest would find in a process of its own."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    paths = [str(folder / part) for part in PATHS]
    sys.path[:0] = paths
    os.environ |= {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]), "HYPOTHESIS_PROFILE": "mutation"}
    code = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "mutation_profile", *args])
    sys.stdout.flush()
    os._exit(int(code))


def _used_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(record: Path) -> dict[str, dict[str, Any]]:
    """The last result of every mutant by its digest; a line that was cut off is left out."""
    found = {}
    for line in record.read_text().splitlines() if record.exists() else []:
        try:
            found[json.loads(line)["digest"]] = json.loads(line)
        except ValueError:
            continue
    return found


def stands(result: dict[str, Any] | None) -> bool:
    """Whether a mutant need not be run again."""
    return result is not None and (result["result"] != "survived" or result["tests"] == tests_digest())


def run_all(mutants: Sequence[Mutant], record: Path, results: dict[str, dict[str, Any]]) -> None:
    """Run what has no result that stands, and append each to the record and to `results`."""
    waiting = [mutant for mutant in mutants if not stands(results.get(mutant.digest))]
    if not waiting:
        return
    for module in IMPORTED:
        importlib.import_module(module)
    copy, checked = Copy(record.parent / "mutation-copy"), set()
    for number, mutant in enumerate(waiting, 1):
        if subset(mutant.path) not in checked:
            _check_subset(copy, mutant.path)
            checked.add(subset(mutant.path))
        result, seconds = copy.run(mutant.path, mutant.text)
        line = {"digest": mutant.digest, "mutant": mutant.name, "result": result, "seconds": round(seconds, 1), "tests": tests_digest()}
        with record.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        results[mutant.digest] = line
        print(f"{number} of {len(waiting)}: {result} ({seconds:.1f} s): {mutant.name}", flush=True)
    shutil.rmtree(copy.folder)


def _check_subset(copy: Copy, path: str) -> None:
    """Run a subset on the code as it is: it must pass, in time."""
    started = time.monotonic()
    result, seconds = copy.run(path, None)
    clock = time.monotonic() - started
    print(f"subset of {path}: {result} in {seconds:.1f} s of CPU time, {clock:.1f} s on the clock", flush=True)
    if result != "survived":
        raise SystemExit(f"{path}: its subset fails without a mutation, at {result}; repair it first")
    if seconds > SUBSET_SECONDS or clock > TIME_OUT / 2:
        raise SystemExit(f"{path}: its subset takes {seconds:.1f} s of CPU time, {clock:.1f} s on the clock; at most {SUBSET_SECONDS:g} s")


def survivors(mutants: Sequence[Mutant], results: dict[str, dict[str, Any]]) -> Iterator[tuple[Mutant, str | None]]:
    """(mutant, reason) of all that no test killed."""
    for mutant in mutants:
        if results[mutant.digest]["result"] == "survived":
            yield mutant, SURVIVORS.get((mutant.path, mutant.before, mutant.after))


def page(mutants: Sequence[Mutant], positions: dict[str, int], results: dict[str, dict[str, Any]]) -> str:
    """docs/mutation.md."""
    alive = list(survivors(mutants, results))
    killed = len(mutants) - len(alive)
    lines = ["# Mutation testing", "", "Written by `make test-mutation`; do not edit.", ""]
    lines += [
        f"{len(mutants)} mutants of the references and the model, one at each of as many of {sum(positions.values())} positions that "
        f"can be mutated, drawn by the seed {SEED}: **{killed} killed, {len(alive)} alive, {killed / len(mutants):.1%} killed**; "
        f"at least {LEAST:.0%} are asked for. What is mutated, how, and what is left alone is told in `tests/mutation.py`; "
        f"the tests that each file's mutants are run against, 15 s at most, are in `tests/mutation_subsets.py`.",
        "", "| file | positions | mutants | killed | alive |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for path, count in positions.items():
        mine = [mutant for mutant in mutants if mutant.path == path]
        left = sum(mutant.path == path for mutant, _ in alive)
        lines.append(f"| `{path}` | {count} | {len(mine)} | {len(mine) - left} | {left} |")
    lines.append(f"| all | {sum(positions.values())} | {len(mutants)} | {killed} | {len(alive)} |")
    lines += [
        "",
        "## Alive",
        "",
        "No caller who keeps to what an op or the model promises can tell one of these from the code, for the reason given.",
    ]
    for mutant, reason in alive:
        lines += [
            "",
            f"`{mutant.path}`: {reason or '**no reason given**'}",
            "",
            "```diff",
            f"- {mutant.before}",
            f"+ {mutant.after}",
            "```",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample, run what is left, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=240, help="about how many mutants")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "mutation.jsonl")
    parser.add_argument("--only", default="", help="only mutants whose name contains this; no page is written")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    options = parser.parse_args(arguments)
    mutants, positions = sample(options.count)
    mutants = [mutant for mutant in mutants if options.only in mutant.name]
    if options.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    options.record.parent.mkdir(parents=True, exist_ok=True)
    results = read(options.record)
    try:
        run_all(mutants, options.record, results)
    except KeyboardInterrupt:
        print("interrupted; the next call goes on from there", flush=True)
        return 130
    alive = list(survivors(mutants, results))
    for mutant, reason in alive:
        print(f"alive: {mutant.name}\n    {reason or 'NO REASON in mutation_subsets.SURVIVORS'}")
    share = 1 - len(alive) / len(mutants)
    print(f"mutation: {len(mutants)} mutants, {len(mutants) - len(alive)} killed ({share:.1%}), {len(alive)} alive")
    if not options.only:
        (ROOT / "docs" / "mutation.md").write_text(page(mutants, positions, results))
    return int(share < LEAST or any(reason is None for _, reason in alive))


if __name__ == "__main__":
    sys.exit(main())
