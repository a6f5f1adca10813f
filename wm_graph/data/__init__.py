"""Data files that travel with the package."""

from pathlib import Path


def tokenizer_path() -> Path:
    """The bundled byte-level tokenizer: <pad> 0, <bos> 1, <eos> 2, then byte b as token 3 + b; see `make_tokenizer`."""
    return Path(__file__).with_name("tokenizer.json")
