"""`wm bench`."""

from pathlib import Path
from typing import Any

import typer

from wm_graph.cli.checks import split_names
from wm_graph.cli.console import human_bytes, print_json, print_table, progress_bar


def command(
    bundle: Path = typer.Argument(help="The bundle."),
    runtimes: str | None = typer.Option(None, help="Runtimes, separated by commas.  [default: all that run here]"),
    prompt_tokens: int = typer.Option(512, min=1, help="Tokens of the prompt."),
    new_tokens: int = typer.Option(128, min=1, help="Tokens decoded one by one."),
    repeats: int = typer.Option(3, min=1, help="Measure this often and take the median."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure speed, cold start and memory of a bundle in each runtime, each in a process of its own."""
    from wm_graph.cli.checks import available_runtimes, require_runtimes
    from wm_graph.cli.measuring import measure_apart
    from wm_runtimes import RUNTIMES, open_bundle

    names = available_runtimes() if runtimes is None else split_names(runtimes, tuple(RUNTIMES), "runtime")
    require_runtimes(names)
    opened = open_bundle(bundle)
    results: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for index, name in enumerate(names):
            progress(f"measuring {name}", index / len(names))
            results.append(measure_apart(bundle, name, prompt_tokens, new_tokens, repeats))
    if as_json:
        print_json({"bundle": str(bundle), "name": opened.name, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "results": results})
        return
    print(f"{opened.name}, {opened.dtype}: prompt of {prompt_tokens} tokens, {new_tokens} decoded; median of {repeats}")
    header = ("runtime", "prefill tok/s", "decode tok/s", "open s", "warm-up s", "peak memory")
    numbers = ("prefill_tokens_per_s", "decode_tokens_per_s", "open_s", "warm_up_s")
    rows = [[str(row["runtime"]), *(f"{row[key]:.{1 if 'tokens' in key else 2}f}" for key in numbers), human_bytes(row["rss_bytes"])] for row in results]
    print_table(header, rows, numeric=range(1, 6))
    print("open: from the start of a process to a session; warm-up: the first prefill and step, compilation included.")
