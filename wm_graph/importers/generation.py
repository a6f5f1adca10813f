"""Token ids and chat template: the `generation.json` of a checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

from wm_graph.errors import CheckpointError

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def make_generation(
    label: str,
    vocab_size: int,
    token_to_id: Callable[[str], int | None],
    *,
    bos: int | None,
    eos: Sequence[int],
    pad: int | None,
    add_bos: bool,
    chat_template: str | None,
) -> dict[str, Any]:
    """The generation settings, checked against the vocabulary.

    Args:
        label: the source, for messages.
        vocab_size: ids are below it.
        token_to_id: id of a token's text, or None; finds end-of-turn tokens, which stop generation like `eos`.
        bos: beginning of sequence.
        eos: every end of sequence; the first is the model's `eos`.
        pad: padding; dropped when past the vocabulary, since padding is never embedded.
        add_bos: prompts begin with `bos`.
        chat_template: Jinja text.

    Raises:
        CheckpointError: an id is outside the vocabulary, or `add_bos` without `bos`.
    """
    for key, token in [("bos_token_id", bos), *(("eos_token_id", token) for token in eos)]:
        if token is not None and not 0 <= token < vocab_size:
            raise CheckpointError(f"{label}: {key} is {token}; expected an id below the vocabulary's {vocab_size}")
    if add_bos and bos is None:
        raise CheckpointError(f"{label}: prompts are to begin with a bos token, but there is none; expected bos_token_id")
    turns = [token_to_id(text) for text in END_OF_TURN]
    stop = dict.fromkeys([*eos, *(token for token in turns if token is not None and token < vocab_size)])
    pad = pad if pad is not None and 0 <= pad < vocab_size else None
    tokens = {"bos": bos, "eos": eos[0] if eos else None, "pad": pad, "stop": list(stop), "add_bos": add_bos}
    return {"tokens": tokens, "chat_template": chat_template}
