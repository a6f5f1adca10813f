"""Writes `tokenizer.json`, the byte-level tokenizer of models that have none of their own.

    python -m wm_graph.data.make_tokenizer

One token per byte and no merges, so any UTF-8 text round-trips and nothing had to be trained. Special tokens in the text ("<eos>") are
read as special tokens, as in every tokenizer of this format.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from wm_graph.data import tokenizer_path

SPECIAL = ("<pad>", "<bos>", "<eos>")


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others are numbered upwards from U+0100, in order.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in plain else chr(256 + next(others)) for byte in range(256)]


def make_tokenizer() -> Tokenizer:
    """The tokenizer, built anew."""
    vocab = {text: index for index, text in enumerate([*SPECIAL, *byte_characters()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


if __name__ == "__main__":
    tokenizer_path().write_text(make_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")
