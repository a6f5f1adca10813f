"""Tables and verdicts from the measurements, written between two marks of docs/performance.md."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- cpu: begin; written by benchmarks/cpu.py -->", "<!-- cpu: end -->"
OURS = "wm-graph"
GENAI = "onnxruntime-genai"
MOBIUS = "mobius, onnxruntime"
PREFILL_PEERS = ("transformers eager", MOBIUS, "mobius --ep cpu, onnxruntime")

Measured = dict[str, Any]


def write_report(results: Measured, document: Path) -> None:
    """Replace what lies between the marks of the document."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{render(results)}\n\n{END}{after}", encoding="utf-8")


def render(results: Measured) -> str:
    """All tables as markdown."""
    parts = (_machine, _bars, _smollm2, _mamba2, _cheems, _cheems_320m, _export, _capacity)
    return "\n\n".join(text for part in parts if (text := part(results)))


def bars(results: Measured) -> list[tuple[str, float | None, str, float]]:
    """(what, value or None where it was not measured, "≥", "≤" or "<", limit) of every bar."""
    tools = results.get("smollm2", {}).get("tools", {})
    ours = tools.get(OURS, {})
    best = max((tools[name]["prefill_tok_s"] for name in PREFILL_PEERS if "prefill_tok_s" in tools.get(name, {})), default=None)
    cheems = {name: tool.get("decode_tok_s") for name, tool in results.get("cheems", {}).get("tools", {}).items()}
    export = results.get("export", {})
    memory_limit = 3 * export["weights_mb"] + 500 if "weights_mb" in export else None
    return [
        (f"SmolLM2 decode ÷ {GENAI}", _ratio(ours.get("decode_tok_s"), tools.get(GENAI, {}).get("decode_tok_s")), "≥", 1.0),
        ("SmolLM2 prefill ÷ best of transformers and mobius", _ratio(ours.get("prefill_tok_s"), best), "≥", 1.1),
        ("SmolLM2 `wm generate`, start to first token, s", ours.get("cold_s"), "≤", 1.3),
        ("SmolLM2 peak memory, MB", max((ours[key] for key in ("rss_mb", "cold_rss_mb") if key in ours), default=None), "≤", 800),
        *_mamba2_bars(results),
        ("cheems-20m decode ÷ eager", _ratio(cheems.get("onnxruntime-cpu"), cheems.get("eager")), "≥", 2.0),
        *_cheems_320m_bars(results),
        ("cheems-320m `wm export`, s", export.get("seconds"), "<", 180),
        ("cheems-320m peak memory ÷ (3 × weights + 500 MB)", _ratio(export.get("rss_mb"), memory_limit), "<", 1.0),
        ("cheems-320m largest ONNX header, MB", max(export.get("header_mb", {}).values(), default=None), "<", 5),
        ("cheems-320m session creation, s", export.get("open_s"), "<", 15),
        *_flatness(results),
    ]


def _mamba2_bars(results: Measured) -> Iterable[tuple[str, float | None, str, float]]:
    tools = results.get("mamba2", {}).get("tools", {})
    ours, peer = tools.get(OURS, {}), tools.get(MOBIUS, {})
    yield "Mamba2-115M decode ÷ mobius", _ratio(ours.get("decode_tok_s"), peer.get("decode_tok_s")), "≥", 1.0
    yield "Mamba2-115M prefill ÷ mobius", _ratio(ours.get("prefill_tok_s"), peer.get("prefill_tok_s")), "≥", 1.3


def _cheems_320m_bars(results: Measured) -> Iterable[tuple[str, float | None, str, float]]:
    part = results.get("cheems-320m", {})
    decode = {name: tool.get("decode_tok_s") for name, tool in part.get("tools", {}).items()}
    ours = decode.get("onnxruntime-cpu")
    yield "cheems-320m decode ÷ eager", _ratio(ours, decode.get("eager")), "≥", 0.95
    yield "cheems-320m decode, share of what memory allows, %", _share(ours, _fastest(part)), "≥", 70


def _fastest(part: Measured) -> float | None:
    """Steps a second at which the machine could read the weights, if it did nothing else."""
    rate = part.get("memory", {}).get("read_gb_s")
    return rate * 1e3 / part["step_mb"] if rate is not None else None


def _share(value: float | None, limit: float | None) -> float | None:
    ratio = _ratio(value, limit)
    return None if ratio is None else 100 * ratio


def _flatness(results: Measured) -> Iterable[tuple[str, float | None, str, float]]:
    for name, sizes in results.get("capacity", {}).get("models", {}).items():
        times = [size["step_ms"] for size in sizes.values() if "step_ms" in size]
        yield f"{name} step, slowest ÷ fastest over capacities", _ratio(max(times, default=None), min(times, default=None)), "≤", 1.15


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _machine(results: Measured) -> str:
    machine, how = results["machine"], results["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, "
        f"Python {machine['python']}; {versions}. Load before the start {machine['load_at_start']}.\n"
        f"Median of {how['repeats']} runs; prompt of {how['prompt']} tokens, {how['steps']} decoded, {how['threads']} threads."
    )


def _bars(results: Measured) -> str:
    rows = []
    for what, value, sign, limit in bars(results):
        met = value is not None and (value >= limit if sign == "≥" else value < limit or (sign == "≤" and value == limit))
        rows.append((what, _number(value), f"{sign} {limit:g}", "not run" if value is None else "yes" if met else "**no**"))
    return "### Bars\n\n" + _table(("", "measured", "bar", "met"), rows)


def _smollm2(results: Measured) -> str:
    part = results.get("smollm2", {})
    title = "### SmolLM2-135M-Instruct, float32\n\n"
    if "tools" not in part:
        return title + f"not run ({part.get('not_run', 'left out')})"
    reference = part["tools"].get("transformers eager", {}).get("tokens")
    rows = [_tool_row(name, tool, reference) for name, tool in part["tools"].items()]
    columns = ("", "version", "prefill tok/s", "decode tok/s", "cold s", "peak MB", "private MB", "file MB", "cold peak MB", "same tokens")
    return title + _table(columns, rows)


def _tool_row(name: str, tool: Measured, reference: list[int] | None) -> tuple[str, ...]:
    version = str(tool.get("version", ""))
    if "not_run" in tool:
        return (name, version, f"not run ({tool['not_run'].replace('|', '/')})", *[""] * 7)
    keys = ("prefill_tok_s", "decode_tok_s", "cold_s", "rss_mb", "rss_anon_mb", "rss_file_mb", "cold_rss_mb")
    same = f"{_agreement(tool['tokens'], reference)} of {len(reference)}" if reference else ""
    return (name, version, *(_number(tool.get(key)) for key in keys), same)


def _agreement(tokens: list[int], reference: list[int]) -> int:
    """Length of the common beginning."""
    return next((index for index, (one, other) in enumerate(zip(tokens, reference, strict=False)) if one != other), len(reference))


def _mamba2(results: Measured) -> str:
    part = results.get("mamba2", {})
    title = "### Mamba2-115M, float32\n\n"
    if "tools" not in part:
        return title + f"not run ({part.get('not_run', 'left out')})"
    rows = []
    for name, tool in part["tools"].items():
        if "not_run" in tool:
            rows.append((name, str(tool.get("version", "")), f"not run ({tool['not_run'].replace('|', '/')})", *[""] * 3))
            continue
        logits = f"{tool['logit_difference']:.5f} of {tool['largest_logit']:.1f}" if "logit_difference" in tool else "not run"
        keys = ("prefill_tok_s", "decode_tok_s", "rss_mb")
        rows.append((name, str(tool.get("version", "")), *(_number(tool.get(key)) for key in keys), logits))
    return title + _table(("", "version", "prefill tok/s", "decode tok/s", "peak MB", "logits off by"), rows)


def _cheems(results: Measured) -> str:
    part = results.get("cheems", {})
    return "### cheems-20m, float32\n\n" + _runtimes(part)


def _cheems_320m(results: Measured) -> str:
    part = results.get("cheems-320m", {})
    text = "### cheems-320m, float32\n\n" + _runtimes(part)
    if (fastest := _fastest(part)) is None:
        return text
    rate, size = _number(part["memory"]["read_gb_s"]), _number(part["step_mb"])
    return f"{text}\n\nMemory is read at {rate} GB/s, a step must read {size} MB of weights: at most {_number(fastest)} steps a second."


def _runtimes(part: Measured) -> str:
    """Our runtimes on one model."""
    if "tools" not in part:
        return f"not run ({part.get('not_run', 'left out')})"
    keys = ("prefill_tok_s", "decode_tok_s", "rss_mb")
    rows = [(name, *(tool.get("not_run") or _number(tool.get(key)) for key in keys)) for name, tool in part["tools"].items()]
    return _table(("runtime", "prefill tok/s", "decode tok/s", "peak MB"), rows)


def _export(results: Measured) -> str:
    part = results.get("export", {})
    title = "### Exporting cheems-320m, float32\n\n"
    if "seconds" not in part:
        return title + f"not run ({part.get('not_run', 'left out')})"
    rows = [
        ("weights, MB", _number(part["weights_mb"])),
        ("`wm export`, s", _number(part["seconds"])),
        ("its peak memory, MB", _number(part["rss_mb"])),
        *((f"`{name}`, MB", _number(size)) for name, size in sorted(part["header_mb"].items())),
        ("opening a session, s", _number(part["open_s"])),
        ("one decode step, ms", _number(part["step_ms"])),
    ]
    return title + _table(("", "measured"), rows)


def _capacity(results: Measured) -> str:
    part = results.get("capacity", {})
    title = "### One decode step by capacity, ms\n\n"
    if not part.get("models"):
        return title + f"not run ({part.get('not_run', 'left out')})"
    sizes = next(iter(part["models"].values()))
    rows = [(name, *(_step_cell(each) for each in found.values())) for name, found in part["models"].items()]
    return title + _table(("", *(f"capacity {size}" for size in sizes)), rows)


def _step_cell(step: Measured) -> str:
    return f"not run ({step['not_run']})" if "not_run" in step else _number(step["step_ms"])


def _number(value: float | None) -> str:
    """Three digits or more, and never an exponent."""
    if value is None:
        return "not run"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" if index == 0 else "---:" for index in range(len(columns))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
