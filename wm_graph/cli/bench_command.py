"""`wm bench`."""

from typing import Annotated, Any

import typer

from wm_graph.cli.arguments import AsJson, BundlePath, RuntimeNames
from wm_graph.cli.checks import split_names
from wm_graph.cli.console import human_bytes, print_json, print_table, progress_bar


def command(
    bundle: BundlePath,
    runtimes: RuntimeNames = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded one by one.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Measure this often and take the median.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure speed, cold start and memory of runtimes.

    Each runtime is measured in a process of its own.
    """
    from wm_graph.cli.checks import available_runtimes, require_runtimes
    from wm_graph.cli.measuring import measure_apart
    from wm_runtimes import RUNTIMES, open_bundle
    from wm_runtimes.labels import WAYS, runtime_of

    known = (*RUNTIMES, *(f"{name}:{way}" for name, ways in WAYS.items() for way in ways))
    asked = None if runtimes is None else split_names(runtimes, known, "runtime")
    opened = open_bundle(bundle)
    names = available_runtimes(opened) if asked is None else asked
    require_runtimes([runtime_of(name) for name in names])
    results: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for index, name in enumerate(names):
            progress(f"measuring {name}", index / len(names))
            results.append(measure_apart(bundle, name, prompt_tokens, new_tokens, repeats))
    if as_json:
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
        print_json({"bundle": str(bundle), "name": opened.name, "dtype": opened.dtype, **sizes, "results": results})
        return
    print(f"{opened.name}, {opened.dtype}: prompt of {prompt_tokens} tokens, {new_tokens} decoded; median of {repeats}")
    header = ("runtime", "prefill tok/s", "decode tok/s", "open s", "warm-up s", "peak memory")
    rows = []
    for row in results:
        speeds = [f"{row[key]:.1f}" for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        waits = [f"{row[key]:.2f}" for key in ("open_s", "warm_up_s")]
        rows.append([row["runtime"], *speeds, *waits, human_bytes(row["rss_bytes"])])
    print_table(header, rows, numeric=range(1, 6))
    print("open: from the start of a process to a session; warm-up: the first prefill and step, compilation included.")
