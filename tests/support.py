"""README's table of what works where, made from the lists that the parametrized tests run. `python tests/support.py` prints it.

A new architecture gets a row in ARCHITECTURES; its cells fill as it enters the tests' lists.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from helpers import COMPILED_FAMILIES, DTYPES, FAMILIES

# Architecture: (its tiny models in helpers.FAMILIES, its model_type in transformers).
ARCHITECTURES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "Cheems, arXiv 2412.11834": (("cheems-tiny", "cheems-tiny-moe"), None),
    "Cheems, arXiv 2407.16958": (("cheems-2407-tiny",), None),
    "Llama": (("llama-tiny",), "llama"),
    "Doge, dense": (("doge-tiny",), "doge"),
    "Mamba-2": (("mamba2-tiny",), "mamba2"),
    "Jamba": (("jamba-tiny",), "jamba"),
    "Bamba": (("bamba-tiny",), "bamba"),
}
HEADER = ("architecture", "import", "export", "`eager`, `onnxruntime-cpu`", "`compiled`")


def _kinds(models: Mapping[str, tuple[Any, Any]]) -> set[str]:
    """`model_type` of the makers in a test's table of models: `make_llama` makes a llama."""
    return {make.__name__.removeprefix("make_") for make, _ in models.values()}


def table() -> str:
    """The table as Markdown."""
    import test_export_hf
    import test_import
    import test_import_hybrid

    imported = _kinds(test_import.MODELS | test_import_hybrid.MODELS)
    written, gguf = _kinds(test_export_hf.MODELS), set(test_import.GGUF)

    def row(name: str) -> Iterable[str]:
        families, kind = ARCHITECTURES[name]
        dtypes = ", ".join({"fp32": "float32", "fp16": "float16"}[dtype] for dtype in DTYPES) if set(families) <= set(FAMILIES) else ""
        yield name
        yield ", ".join(word for word, kinds in (("GGUF", gguf), ("Hugging Face", imported)) if kind in kinds)
        yield ", ".join(filter(None, (f"ONNX {dtypes}" if dtypes else "", "Hugging Face" if kind in written else "")))
        yield dtypes
        yield "float32" if set(families) & set(COMPILED_FAMILIES) else ""

    rows = [HEADER, ("---",) * len(HEADER), *(tuple(cell or "–" for cell in row(name)) for name in ARCHITECTURES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
