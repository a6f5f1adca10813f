"""`wm presets`."""

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.console import human_count, print_json, print_table


def command(as_json: AsJson = False) -> None:
    """List the named configurations."""
    from wm_graph.presets import PRESETS
    from wm_graph.shapes import count_parameters

    if as_json:
        print_json([{"name": name, "parameters": count_parameters(cfg), "config": cfg.to_dict()} for name, cfg in PRESETS.items()])
        return
    rows = []
    for name, cfg in PRESETS.items():
        attends = any("attention" in mixer for mixer, _ in cfg.layers)
        hidden = cfg.d_ff if any(feed_forward != "none" for _, feed_forward in cfg.layers) else "-"
        sizes = (cfg.d_model, hidden, len(cfg.layers), cfg.n_head if attends else cfg.ssd_head, cfg.vocab_size)
        rows.append([name, human_count(count_parameters(cfg)), *map(str, sizes), layer_summary(cfg.layers)])
    header = ("preset", "parameters", "width", "hidden", "layers", "heads", "vocabulary", "mixers, feed-forwards")
    print_table(header, rows, numeric=range(1, 7))


def layer_summary(layers: tuple[tuple[str, str], ...]) -> str:
    """A layer pattern in words: 7 ssd + mlp, 1 dynamic_mask_attention + mlp."""
    counts: dict[str, int] = {}
    for mixer, feed_forward in layers:
        kind = f"{mixer} + {feed_forward}"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
