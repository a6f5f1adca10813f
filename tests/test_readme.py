"""What the documents say about the code is so."""

import re
from pathlib import Path

import pytest

from wm_graph.presets import PRESETS
from wm_graph.shapes import count_parameters

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "docs/design.md", "docs/performance.md"]


def heads(cfg):
    """Of attention where a layer attends, else of the scan."""
    return cfg.n_head if any("attention" in mixer for mixer, _ in cfg.layers) else cfg.ssd_head


def test_readme_preset_table_is_the_presets():
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) M \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    expected = [
        (name, f"{count_parameters(cfg) / 1e6:.1f}", str(cfg.d_model), str(len(cfg.layers)), str(heads(cfg)), str(cfg.vocab_size))
        for name, cfg in PRESETS.items()
    ]
    assert rows == expected


def test_readme_support_table_is_what_the_tests_run():
    pytest.importorskip("transformers")
    from support import table

    assert table() in (ROOT / "README.md").read_text(encoding="utf-8"), "run: python tests/support.py"


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text())
    missing = [link for link in links if not ((ROOT / document).parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_documents_exist(document):
    named = re.findall(r"`((?:wm_\w+|docs|kernels|export|runtimes|tests|benchmarks|\.ci)/[\w./]*)`", (ROOT / document).read_text())
    roots = [ROOT, *(ROOT / folder for folder in ("kernels", "export", "runtimes"))]
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_named_in_documents_exist(document):
    named = set(re.findall(r"(?:^|`|PROFILE=deep )make ([a-z-]+)", (ROOT / document).read_text(), re.M))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named <= targets
