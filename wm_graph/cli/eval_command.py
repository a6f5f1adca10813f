"""`wm eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wm_graph.cli.arguments import AsJson, BundlePath
from wm_graph.cli.checks import require_runtimes
from wm_graph.cli.console import print_fields, print_json, print_table, progress_bar
from wm_graph.errors import ConfigError, InputError
from wm_graph.quiet import quiet_libraries

if TYPE_CHECKING:
    from wm_runtimes.evaluate import Evaluation


def command(
    bundle: BundlePath,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The text, UTF-8.")],
    runtime: Annotated[str, typer.Option(help="Where to run; `wm doctor` lists the runtimes.")] = "onnxruntime-cpu",
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.  [default: the model's positions, at most 2048]", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows side by side.")] = 8,
    buckets: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Ends of the rows by length of context.  [default: powers of two]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a text, by length of context.

    The text is cut into windows, each read from an empty state.
    """
    from wm_runtimes import open_bundle
    from wm_runtimes.evaluate import check_edges, evaluate_text
    from wm_runtimes.labels import runtime_of

    edges = None if buckets is None else check_edges(_parse_edges(buckets))
    opened = open_bundle(bundle)
    require_runtimes([runtime_of(runtime)])
    words = read_text(text)
    with progress_bar() as progress, quiet_libraries():
        progress(f"opening {runtime}", 0.0)
        result = evaluate_text(opened, words, runtime, context, batch, edges, progress=progress)
    if as_json:
        what = {"bundle": str(bundle), "name": opened.name, "dtype": opened.dtype, "runtime": runtime, "text": str(text)}
        print_json(what | result.to_dict())
        return
    print(f"{opened.name}, {opened.dtype}, {runtime}: {text}, {result.text_bytes} bytes, {result.text_tokens} tokens")
    print_evaluation(result)


def print_evaluation(result: "Evaluation") -> None:
    """The whole, then the rows by length of context."""
    numbers = {"nats/token": result.nats_per_token, "perplexity": result.perplexity, "bits/byte": result.bits_per_byte}
    print_fields({name: f"{value:.6g}" for name, value in numbers.items()})
    print()
    header = ("context", "tokens", "nats/token", "perplexity")
    rows = [
        [f"{bucket.first}-{bucket.last}", str(bucket.tokens), f"{bucket.nats_per_token:.6g}", f"{bucket.perplexity:.6g}"]
        for bucket in result.buckets
    ]
    total = ["all", str(result.tokens), f"{result.nats_per_token:.6g}", f"{result.perplexity:.6g}"]
    print_table(header, [*rows, total], numeric=range(1, 4))
    print(f"context: tokens before the predicted one in its window; {result.windows} windows of at most {result.context} tokens.")


def read_text(file: Path) -> str:
    """A file's text as it is, line ends included.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); convert it") from error


def _parse_edges(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) <= 18):
            raise ConfigError(f"--buckets: {word[:40]!r} is no length; expected integers separated by commas, such as 128,512,2048")
    return [int(word) for word in words]
