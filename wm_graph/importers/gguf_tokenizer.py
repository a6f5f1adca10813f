"""A tokenizer.json from the vocabulary in a GGUF file: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

Splitting follows the tokenizers that these vocabularies were trained with, which llama.cpp names by `tokenizer.ggml.pre`.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from wm_graph.errors import CheckpointError
from wm_graph.importers.fields import Fields, clip

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact")
_GPT2 = ("gpt-2", "gpt2", "default")
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN_2 = ("qwen2",)
_KNOWN = (*_DIGITS_THEN_GPT2, *_GPT2, *_LLAMA_3, *_QWEN_2)


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says about text.

    Attributes:
        json: text of a tokenizer.json, or None where the file has no vocabulary.
        ids: text -> id.
        adds_bos: whether a prompt begins with bos where the file does not say.
    """

    json: str | None
    ids: dict[str, int]
    adds_bos: bool


def read_tokenizer(fields: Fields, vocab_size: int) -> GgufTokenizer:
    """Build the tokenizer of a GGUF file.

    Raises:
        CheckpointError: the vocabulary is damaged, larger than the model's, or of a kind that is not known here.
    """
    kind = fields.text("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return GgufTokenizer(None, {}, False)
    if kind not in ("gpt2", "llama"):
        raise fields.unsupported("tokenizer.ggml.model", "'gpt2' or 'llama'")
    tokens = fields.texts("tokenizer.ggml.tokens")
    if len(tokens) > vocab_size:
        raise CheckpointError(f"{fields.label}: tokenizer.ggml.tokens has {len(tokens)} tokens; expected at most the model's {vocab_size}")
    ids = {token: index for index, token in enumerate(tokens)}
    pre = fields.text("tokenizer.ggml.pre", "default")
    try:
        tokenizer = _byte_level(fields, ids, pre) if kind == "gpt2" else _sentencepiece(fields, tokens, ids)
        _add_special(fields, tokenizer, tokens)
        text = tokenizer.to_str()
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{fields.label}: the vocabulary makes no tokenizer ({clip(str(error))})") from error
    return GgufTokenizer(text, ids, adds_bos=kind == "llama" or pre in _LLAMA_3)


def _byte_level(fields: Fields, ids: dict[str, int], pre: str) -> Tokenizer:
    if pre not in _KNOWN:
        raise fields.unsupported("tokenizer.ggml.pre", f"one of {', '.join(_KNOWN)}")
    merges = [_split_merge(fields, merge) for merge in fields.texts("tokenizer.ggml.merges")]
    # Llama 3 takes a word that is a token whole, even where the merges do not lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _LLAMA_3))
    if pre in _QWEN_2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = _WORD_PATTERN.replace("DIGITS", "3" if pre in _LLAMA_3 else "1")
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _split_merge(fields: Fields, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise CheckpointError(f"{fields.label}: tokenizer.ggml.merges holds {clip(merge)}; expected two pieces with a space between")
    return left, right


def _sentencepiece(fields: Fields, tokens: list[str], ids: dict[str, int]) -> Tokenizer:
    unknown = fields.optional_id("tokenizer.ggml.unknown_token_id")
    if unknown is not None and not 0 <= unknown < len(tokens):
        raise CheckpointError(f"{fields.label}: tokenizer.ggml.unknown_token_id is {unknown}; expected an id below {len(tokens)}")
    model = models.BPE(
        vocab=ids,
        merges=_merges_from_scores(fields, tokens, ids),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_from_scores(fields: Fields, tokens: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores best: every split of a token into two tokens, ordered by the score of the whole."""
    scores = fields.numbers("tokenizer.ggml.scores")
    _check_length(fields, "tokenizer.ggml.scores", tokens)
    splits = [
        (score, scores[ids[left]], scores[ids[right]], index, left, right)
        for index, (token, score) in enumerate(zip(tokens, scores, strict=True))
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in ids and right in ids
    ]
    # Equal scores: the earlier token first, and of its splits the one with the better halves, as transformers orders them.
    splits.sort(key=lambda split: (-split[0], split[3], -split[1], -split[2]))
    return [(left, right) for *_, left, right in splits]


def _add_special(fields: Fields, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Tokens that are found in the text before it is split; control tokens are also left out by decoding."""
    if "tokenizer.ggml.token_type" not in fields.values:
        return
    kinds = fields.integers("tokenizer.ggml.token_type")
    _check_length(fields, "tokenizer.ggml.token_type", tokens)
    special = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(special)


def _check_length(fields: Fields, key: str, tokens: list[str]) -> None:
    count = len(fields.values[key])
    if count != len(tokens):
        raise CheckpointError(f"{fields.label}: {key} has {count} entries; expected {len(tokens)}, one for each token")
