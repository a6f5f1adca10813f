"""`wm bisect`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wm_graph.cli.arguments import AsJson, BundlePath
from wm_graph.cli.checks import require_runtimes
from wm_graph.cli.console import print_fields, print_json, progress_bar
from wm_graph.quiet import quiet_libraries

if TYPE_CHECKING:
    from wm_runtimes.bundle import Bundle
    from wm_runtimes.findings import Finding, Report
    from wm_runtimes.plain_model import Feed


def command(
    bundle: BundlePath,
    a: Annotated[str, typer.Option("--a", metavar="RUNTIME", help="One side: a runtime, or `oracle`, the float64 references.")] = "eager",
    b: Annotated[
        str, typer.Option("--b", metavar="RUNTIME", help="The other; onnxruntime-cpu:model.onnx is its portable graph.")
    ] = "onnxruntime-cpu",
    b_bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Bundle of the other side, of the same configuration, in any dtype.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to feed, continued with the likeliest tokens.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="IDS", help="The same as token ids, such as 1,80,81.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random rows, where neither is given.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Random rows, of unequal lengths.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the longest random row.")] = 300,
    pieces: Annotated[int, typer.Option(min=1, help="Feed each prompt in this many calls.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Decode steps after the prompts.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Find the first tensor out of budget between two runtimes.

    Or between two bundles of one configuration. It prints module, op, step, index, both values and a command that finds the same again.
    Exit code 1 says that there is one.
    """
    from wm_graph.errors import BudgetError, ConfigError
    from wm_runtimes import RUNTIMES, open_bundle

    if prompt is not None and tokens is not None:
        raise ConfigError("--prompt and --tokens are two ways to say the same; give one")
    opened = open_bundle(bundle)
    other = opened if b_bundle is None else open_bundle(b_bundle)
    require_runtimes([name for text in ("eager", a, b) if (name := text.partition(":")[0]) in RUNTIMES])
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_runtimes.bisect import bisect
        from wm_runtimes.findings import parse_target

        sides = parse_target(opened, a), parse_target(other, b)
        if prompt is not None:
            tokens = ",".join(map(str, _ids(opened, prompt)))
        feed = make_feed(opened, tokens, seed, rows, length, pieces, steps)
        report = bisect(*sides, feed, progress)
    again = {"--a": a, "--b": b, "--b-bundle": b_bundle, "--tokens": tokens, "--pieces": pieces, "--steps": steps}
    if tokens is None:
        again |= {"--seed": seed, "--rows": rows, "--length": length}
    reproduce = None if report.finding is None else _command(bundle, again)
    if as_json:
        print_json(report.to_dict() | {"reproduce": reproduce})
    else:
        print_report(opened.name, report, reproduce)
    if report.finding is not None:
        raise BudgetError(f"{bundle}: {report.finding.tensor} is out of budget in {report.finding.runtime}, {report.finding.step}")


def make_feed(bundle: "Bundle", tokens: str | None, seed: int, rows: int, length: int, pieces: int, steps: int) -> "Feed":
    """What is fed: one row of given tokens, continued greedily, or random rows; fewer decode steps do not change what comes before.

    The longest of the random rows is cut to what the model has positions for.

    Raises:
        ConfigError: the longest row is shorter than the number of pieces, or the model has too few positions.
        InputError: `tokens` are no token ids.
    """
    import torch

    from wm_graph.errors import ConfigError, InputError
    from wm_runtimes.plain_model import Feed, PlainModel

    vocabulary, positions = bundle.limits.vocab_size, bundle.limits.max_position
    if steps >= positions:
        raise ConfigError(f"--steps {steps}: the model has {positions} positions; decode fewer")
    if tokens is not None:
        ids = parse_ids(tokens)
        if outside := [token for token in ids if not 0 <= token < vocabulary]:
            raise InputError(f"--tokens: id {outside[0]} is outside 0..{vocabulary - 1}, the vocabulary")
        prompt = torch.tensor([ids])
        feed = Feed(prompt, torch.tensor([len(ids)]), min(pieces, len(ids)), torch.zeros((0, 1), dtype=torch.int64))
        return PlainModel(bundle).greedy(feed, steps)
    length = min(length, positions - steps)
    if length < pieces:
        raise ConfigError(f"--length {length} is shorter than the {pieces} pieces of --pieces; give at least one token to a piece")
    generator = torch.Generator().manual_seed(seed)
    length_B = torch.randint(1, length + 1, (rows,), generator=generator)
    # The first row is empty in all pieces but the last; the last row is full: a call that is not padded at its end.
    length_B[0], length_B[-1] = 1, length
    prompt = torch.randint(0, vocabulary, (rows, length), generator=generator)
    decoded = [torch.randint(0, vocabulary, (rows,), generator=generator) for _ in range(steps)]
    return Feed(prompt, length_B, pieces, torch.stack(decoded) if decoded else torch.zeros((0, rows), dtype=torch.int64))


def parse_ids(text: str) -> list[int]:
    """Token ids separated by commas or spaces.

    Raises:
        InputError: a word is no number, or there is none.
    """
    from wm_graph.errors import InputError

    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdecimal() or len(word) > 18:
            raise InputError(f"--tokens: {word[:40]!r} is no token id; expected integers separated by commas, such as 1,80,81")
    if not words:
        raise InputError("--tokens: no token id; give at least one, such as 1,80,81")
    return [int(word) for word in words]


def _ids(bundle: "Bundle", text: str) -> list[int]:
    from wm_graph.errors import InputError
    from wm_runtimes import Tokenizer

    ids = list(Tokenizer.from_bundle(bundle).encode(text))
    if not ids:
        raise InputError(f"the prompt {text!r} has no tokens, and this model starts texts with none; give some text")
    return ids


def _command(bundle: Path, options: dict[str, Any]) -> str:
    """The command that finds the same."""
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["wm", "bisect", str(bundle), *words])


def print_report(name: str, report: "Report", reproduce: str | None) -> None:
    """The finding, a line for each thing to know."""
    searched = f"{report.tensors} tensors in {report.runs} runs"
    if report.finding is None:
        print(f"{name}: nothing out of budget between {report.a} and {report.b}, {searched}")
        return
    found = report.finding
    print(f"{name}: {found.tensor} is out of budget in {found.runtime}, {found.step} ({searched})\n")
    print_fields(_fields(report, found) | {"reproduce": str(reproduce)})


def _fields(report: "Report", found: "Finding") -> dict[str, str]:
    ops = {"model": "none: the code between two ops", "parameter": "none: a weight", "session": "none: the session, around its graph"}
    fields = {"module": found.module, "op": ops.get(found.op, found.op), "output": found.output, "step": found.step}
    if found.op == "model" and found.output != "logits":
        fields["op"] += f", before {found.tensor.rpartition('.')[0]}"
        fields["output"] = f"{found.output}, what the op is given"
    if found.op == "model" and found.reads:
        fields["reads"] = ", ".join(found.reads)
    sides = (report.a, report.b) if report.a != report.b else (f"{report.a} (a)", f"{report.b} (b)")
    values = {"index": str(list(found.index)), sides[0]: _number(found.a), sides[1]: _number(found.b), "float64": _number(found.expected)}
    error = "it cannot be" if found.error is None else f"{found.error:.3g}, limit {found.limit:.3g}"
    if found.R is None and found.tensor.endswith(".expert"):
        return fields | values | {"shortfall": f"{error}, in score budgets"}
    R = "inf" if found.R is None else f"{found.R:.3g}"
    return fields | values | {"R": f"{R}, limit {found.R_limit:g}", "error": error}


def _number(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.9g}"
