"""`wm demo`."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from wm_graph.cli.checks import available_runtimes
from wm_graph.cli.console import human_bytes, human_count, print_table, progress_bar
from wm_graph.quiet import quiet_libraries

PRESET = "cheems-demo"
TEXTS = ("Wonderful matrices", "State spaces and attention")
_PARTS = ("checkpoint", "bundle")
_DRAWS = 16
_NEW_TOKENS = 12
_Result = TypeVar("_Result")


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the checkpoint and the bundle.")] = Path("wm-demo"),
    draws: Annotated[int, typer.Option(min=1, help="Random rows of the parity measurement.")] = _DRAWS,
) -> None:
    """Make a small model, export it, and compare the runtimes.

    Makes cheems-demo with random parameters, exports it, checks the bundle, continues the same text in every runtime that runs here, and
    prints how far each is from a float64 oracle. A second run replaces what the first one made.
    """
    started = time.perf_counter()
    names = available_runtimes()
    make_room(output)
    checkpoint, bundle = (output / part for part in _PARTS)
    _make(checkpoint, bundle)
    _check(bundle)
    _generate(bundle, names)
    _parity(bundle, names, draws)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. What was made:")
    files = [file for part in _PARTS for file in sorted((output / part).iterdir())]
    print_table(("file", "size"), [[str(file), human_bytes(file.stat().st_size)] for file in files], numeric=(1,))
    print(f"\nGo on with: wm info {bundle}, wm bench {bundle}, wm presets, or wm import for a trained model.")


def make_room(output: Path) -> None:
    """Remove what an earlier demo left, so that the artefacts always fit the code; refuse any other folder.

    Raises:
        CheckpointError: the folder holds something that no demo made.
    """
    from wm_graph.errors import CheckpointError

    if not output.exists():
        return
    if not output.is_dir() or (foreign := sorted(path.name for path in output.iterdir() if not _is_ours(path))):
        what = "is not a folder" if not output.is_dir() else f"holds {foreign[0]!r}, which `wm demo` did not make"
        raise CheckpointError(f"{output}: {what}; choose another folder with -o")
    for part in _PARTS:
        if (output / part).exists():
            print(f"Replacing {output / part} of an earlier demo.")
            shutil.rmtree(output / part)


def _is_ours(path: Path) -> bool:
    """Whether a demo made this: a part's name, and the preset's name in what describes it."""
    described = path / ("config.json" if path.name == "checkpoint" else "manifest.json")
    return path.name in _PARTS and not path.is_symlink() and described.is_file() and f'"{PRESET}"' in described.read_text(errors="replace")


def _step(title: str, work: Callable[[], _Result]) -> _Result:
    """Say what is being done, do it, and say how long it took."""
    print(f"{title} ...", flush=True)
    started = time.perf_counter()
    result = work()
    print(f"   {time.perf_counter() - started:.1f} s", flush=True)
    return result


def _make(checkpoint: Path, bundle: Path) -> None:
    from wm_graph.cli.export_command import export_checkpoint
    from wm_graph.cli.init_command import init_checkpoint

    parameters = _step(f"1. Making {PRESET} with random parameters", lambda: init_checkpoint(PRESET, checkpoint))
    _step(
        f"2. Exporting its {human_count(parameters)} parameters to a bundle",
        lambda: export_checkpoint(checkpoint, bundle, ["onnx"], "fp32"),
    )


def _check(bundle: Path) -> None:
    from wm_graph.cli.check_command import check, require_intact

    report = _step("3. Checking the bundle: hashes, formats, golden logits in every runtime", lambda: check(bundle, None))
    require_intact(report)


def _generate(bundle: Path, names: list[str]) -> None:
    """The same texts through every runtime."""
    from wm_runtimes import Tokenizer, open_bundle, open_session

    opened = open_bundle(bundle)
    tokenizer = Tokenizer.from_bundle(opened)
    prompts = [tokenizer.encode(text) for text in TEXTS]

    # Two texts, since a compiled session of several rows shares its graphs with the other steps and one of a single row would not.
    def run(name: str) -> list[list[int]]:
        with quiet_libraries(), open_session(opened, name, batch=len(prompts), capacity=max(map(len, prompts)) + _NEW_TOKENS) as session:
            return session.generate(prompts, _NEW_TOKENS, stop_ids=[])

    print(f"4. Continuing {' and '.join(map(repr, TEXTS))}; the model is untrained, so the token ids make no sense, but they must agree")
    for name in names:
        for tokens in _step(f"   in {name}", partial(run, name)):
            print(f"   {' '.join(map(str, tokens))}")


def _parity(bundle: Path, names: list[str], draws: int) -> None:
    from wm_graph.cli.parity_command import print_report, require_passed
    from wm_runtimes import open_bundle
    from wm_runtimes.parity import FARTHEST, ParityReport, measure_parity

    def measure() -> ParityReport:
        with progress_bar() as progress, quiet_libraries():
            return measure_parity(open_bundle(bundle), names, draws=draws, progress=progress, farthest_prompt=FARTHEST)

    report = _step("5. Measuring parity", measure)
    print_report(report)
    require_passed(report)
