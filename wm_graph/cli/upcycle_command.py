"""`wm upcycle`."""

from pathlib import Path
from typing import Annotated

import typer

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.checks import refuse_existing, refuse_hugging_face
from wm_graph.cli.console import human_count, print_json


def command(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint folder of a dense model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint folder.")],
    experts: Annotated[int, typer.Option(help="Experts per layer, a perfect square.")],
    retrieval_heads: Annotated[int, typer.Option(help="Product-key heads.")],
    picks: Annotated[int, typer.Option(help="Experts per head and token.")],
    retrieval_width: Annotated[int, typer.Option(help="Width of one head's query, even.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the new parameters.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a sparse checkpoint of a dense one, with the same logits.

    Every gated MLP becomes a cross-domain mixture of experts around it, whose experts add nothing until they are trained. The tokenizer and
    the chat template come with it.
    """
    refuse_existing(output)
    refuse_hugging_face(checkpoint)
    from wm_graph.shapes import count_parameters
    from wm_graph.upcycling import upcycle_checkpoint

    sizes = {"n_expert": experts, "n_retrieval_head": retrieval_heads, "n_pick": picks, "d_retrieval": retrieval_width}
    cfg = upcycle_checkpoint(checkpoint, output, seed=seed, **sizes)
    parameters = count_parameters(cfg)
    if as_json:
        print_json({"checkpoint": str(output), "name": cfg.name, "parameters": parameters, **sizes, "seed": seed})
        return
    mixtures = sum(feed_forward == "cdmoe" for _, feed_forward in cfg.layers)
    print(f"{output}: {cfg.name}, {human_count(parameters)} parameters, {experts} experts in each of {mixtures} layers, seed {seed}")
    print(f"next: wm export {output} -o BUNDLE")
