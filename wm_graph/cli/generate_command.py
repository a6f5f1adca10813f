"""`wm generate`. Starts fast: nothing here imports rich, and only the chosen runtime's libraries load."""

import time
from pathlib import Path

import typer

from wm_graph.cli.console import note


def command(
    bundle: Path = typer.Argument(help="The bundle."),
    runtime: str = typer.Option("onnxruntime-cpu", help="Where to run; `wm doctor` lists the runtimes."),
    prompt: list[str] = typer.Option([], "--prompt", "-p", help="Text to continue; several make one batch."),
    prompt_file: list[str] = typer.Option([], help="File whose text is a prompt; - is stdin."),
    prompt_ids: list[str] = typer.Option([], help="Prompt as token ids: '1,80,81'."),
    chat: bool = typer.Option(False, "--chat", help="Put each prompt into the model's chat template."),
    system: str | None = typer.Option(None, help="System message, with --chat."),
    max_tokens: int = typer.Option(128, min=1, help="Most new tokens per prompt."),
    temperature: float = typer.Option(0.0, help="0 takes the likeliest token."),
    top_k: int = typer.Option(0, help="Choose among this many likeliest tokens; 0 is all."),
    top_p: float = typer.Option(1.0, help="Choose among the fewest tokens that reach this probability."),
    seed: int | None = typer.Option(None, help="Repeat the same draws."),
    stop: list[str] = typer.Option([], help="Text that ends a row; not printed."),
    stop_id: list[int] = typer.Option([], help="Token that ends a row, beside the model's own."),
    capacity: int | None = typer.Option(None, min=1, help="Tokens a row can hold.  [default: what the prompts need]"),
    stats: bool = typer.Option(False, "--stats", help="Speeds on stderr."),
    as_json: bool = typer.Option(False, "--json", help="One line of JSON per prompt, when all are done."),
) -> None:
    """Continue prompts; with one prompt the text is printed as it comes."""
    from wm_graph.cli.generating import Run, encode_prompts, open_text, stop_ids
    from wm_runtimes import open_bundle, open_session

    started = time.perf_counter()
    opened = open_bundle(bundle)
    tokenizer = open_text(opened, needed=bool(prompt or prompt_file or stop or chat))
    prompts = encode_prompts(opened, tokenizer, prompt, prompt_file, prompt_ids, chat=chat, system=system)
    stops = stop_ids(opened, stop_id)
    needed = max(len(each.ids) for each in prompts) + max_tokens
    run = Run(prompts, tokenizer, stop, streaming=len(prompts) == 1 and not as_json)
    with open_session(opened, runtime, batch=len(prompts), capacity=capacity or needed) as session:
        ready = time.perf_counter()
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_ids": stops}
        session.generate([each.ids for each in prompts], max_tokens, on_token=run.on_token, **options)
    run.print_rest(max_tokens, as_json)
    if stats:
        note(f"opened in {ready - started:.2f} s; {run.speeds(ready, time.perf_counter())}")
