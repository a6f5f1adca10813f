"""Models, bundles and a reader of pages that the tests of the parity page share."""

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from helpers import MODELS

# A scan with its state, experts that are chosen, a window shorter than the draws, plain attention.
LAYERS = (("ssd", "cdmoe"), ("dynamic_mask_attention", "mlp"), ("attention", "mlp"))
CONFIG = replace(MODELS["window"], layers=LAYERS, name="page-model", vocab_size=64)
CALM = replace(CONFIG, layers=(("ssd", "mlp"), ("attention", "mlp")), name="chooses-nothing")


def make_bundles(made: Callable[..., tuple[Path, Path]]) -> dict[str, Path]:
    """Bundles of CONFIG by their dtype, and `calm`, CALM in float32."""
    dtypes = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return {name: made(CONFIG, dtype)[1] for name, dtype in dtypes.items()} | {"calm": made(CALM)[1]}


class Page(HTMLParser):
    """The page as a reader's browser takes it: texts of keyed cells and rows, attributes, and whether every element is closed."""

    VOID = ("meta", "link", "br", "img", "input", "hr", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.classes: dict[str, str] = {}
        self.text = ""
        self.verdict = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag, f"</{tag}> at line {self.getpos()[0]} closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data
        for _, attributes in self.open:
            if (name := attributes.get("data-key")) and data.strip():
                self.texts.setdefault(name, []).append(data.strip())
                self.classes[name] = attributes.get("class") or ""
            if attributes.get("id") == "verdict":
                self.verdict += data


def read(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open, f"never closed: {page.open}"
    return page
