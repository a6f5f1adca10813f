"""`wm generate`. Starts fast: nothing here imports rich, and only the chosen runtime's libraries load."""

import time
from typing import Annotated

import typer

from wm_graph.cli.arguments import BundlePath
from wm_graph.cli.console import note


def command(
    bundle: BundlePath,
    runtime: Annotated[str, typer.Option(help="Where to run; `wm doctor` lists the runtimes.")] = "onnxruntime-cpu",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; several make one batch.")
    ] = None,
    prompt_file: Annotated[list[str] | None, typer.Option(metavar="FILE", help="File whose text is a prompt; - is stdin.")] = None,
    prompt_ids: Annotated[list[str] | None, typer.Option(metavar="IDS", help="Prompt as token ids, such as 1,80,81.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, with --chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among this many likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the fewest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeat the same draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text that ends a row; not printed.")] = None,
    stop_id: Annotated[list[int] | None, typer.Option(metavar="ID", help="Token that ends a row, beside the model's own.")] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Tokens a row can hold.  [default: what the prompts need]")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and speeds to stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per prompt, when all are done.")] = False,
) -> None:
    """Continue one prompt as text comes, or several as a batch."""
    started = time.perf_counter()
    from wm_graph.cli.generating import Run, encode_prompts, open_text, stop_ids
    from wm_runtimes import open_bundle
    from wm_runtimes.labels import open_labelled, runtime_of

    opened = open_bundle(bundle)
    tokenizer = open_text(opened, needed=bool(prompt or prompt_file or stop or chat))
    prompts = encode_prompts(opened, tokenizer, prompt or [], prompt_file or [], prompt_ids or [], chat=chat, system=system)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_ids": stop_ids(opened, stop_id or [])}
    capacity = capacity or max(len(each.ids) for each in prompts) + max_tokens
    run = Run(prompts, tokenizer, stop or [], streaming=len(prompts) == 1 and not as_json)
    # Packing the weights takes as long as some hundred decode steps could win back: a command answers sooner without.
    options = {"prepack": False} if runtime_of(runtime) == "onnxruntime-cpu" else {}
    with open_labelled(opened, runtime, batch=len(prompts), capacity=capacity, **options) as session:
        ready = time.perf_counter()
        session.generate([each.ids for each in prompts], max_tokens, on_token=run.on_token, **sampling)
    run.print_rest(max_tokens, as_json)
    if stats:
        note(f"opened in {ready - started:.2f} s; {run.speeds(ready, time.perf_counter())}")
