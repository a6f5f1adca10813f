"""Any runtime of a bundle as a model of EleutherAI's lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

The harness finds models that were registered before it looks: importing this module registers `wm-graph`, and running it is the harness's
own command after that:

    python -m wm_runtimes.harness run --model wm-graph --model_args bundle=PATH,runtime=onnxruntime-cpu --tasks NAMES

Needs the extra `eval`, and no torch where the runtime needs none.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from wm_graph.errors import InputError
from wm_runtimes.bundle import open_bundle
from wm_runtimes.evaluate import check_context, score_windows
from wm_runtimes.labels import open_labelled
from wm_runtimes.text import Tokenizer

NAME = "wm-graph"


@register_model(NAME)
class HarnessModel(TemplateLM):  # type: ignore[misc] # lm_eval comes without types
    """A session with the harness's three questions: likelihood of a continuation, of a whole text, and greedy or sampled text.

    Args:
        bundle: the bundle's folder; it needs a tokenizer.
        runtime: a runtime, or one of its ways, as `wm_runtimes.labels` names them.
        batch_size: rows side by side.
        max_length: most tokens of a row; longer contexts lose their beginning. None means what the model's positions allow, at most 2048.
        max_gen_toks: most new tokens where a task does not say.
        seed: of sampled text, where a task asks for it.
        max_batch_size: the harness hands it over; only automatic batch sizes, which are refused, would use it.
        device: the harness hands it over; the runtime decides where it runs.

    Raises:
        InputError: an argument is out of range, or the model has neither bos nor eos.
        BundleError: the bundle is missing or damaged, or has no tokenizer.
        RuntimeUnavailableError: the runtime cannot run here, or cannot run this bundle.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        runtime: str = "onnxruntime-cpu",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise InputError(f"batch_size is {batch_size!r}, expected a number of rows; this model finds none by itself")
        opened = open_bundle(bundle)
        self.max_length = check_context(opened, max_length)
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        self.tokenizer = Tokenizer.from_bundle(opened)
        special = [token for token in (opened.tokens.bos, opened.tokens.eos) if token is not None]
        if not special:
            raise InputError(f"{opened.name} has neither bos nor eos, one of which stands before texts that begin with nothing")
        self._bos, self._eos = special[0], special[-1]
        self.session = open_labelled(opened, runtime, int(batch_size), self.max_length)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text: eos, or bos where there is none."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that begins with nothing: bos, or eos where there is none."""
        return self._bos

    @property
    def tokenizer_name(self) -> str:
        """The model's fingerprint, by which the harness keeps requests apart."""
        return self.session.bundle.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The bundle's chat template, or nothing."""
        return (self.session.bundle.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the bundle's template writes it.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise InputError("this model has no chat template; leave out --apply_chat_template")
        return self.tokenizer.chat_template.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; None begins it with bos where the bundle says so and the text does not do it itself."""
        ids = self.tokenizer.encode(string, add_bos=False)
        tokens = self.tokenizer.tokens
        wanted = tokens.add_bos if add_special_tokens is None else add_special_tokens and tokens.bos is not None
        return [self._bos, *ids] if wanted and ids[:1] != [self._bos] else ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts: windows of `max_length` tokens, of which each but the first is told the token before it."""
        answers = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0], add_bos=False)
            pairs = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1))
            answers.append(sum(nats for nats, _ in self._loglikelihood_tokens([(None, *pair) for pair in pairs])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[tuple[float, bool]]:
        """(ln p(continuation | context), whether greedy choice gives it) of pairs of ids, in the order of the requests."""
        longest = max((len(rest) for _, _, rest in requests), default=0)
        if longest > self.max_length:
            raise InputError(f"a continuation of {longest} tokens does not fit into rows of {self.max_length}; raise max_length")
        # The last token is not fed, so that one more than the session holds can be scored. A beginning without context gets a prefix.
        joined = [[*(context or [self.prefix_token_id]), *rest][-(self.max_length + 1) :] for _, context, rest in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Rows of one call are padded to the longest of them: like lengths go together.
        asked = [index for index in sorted(range(len(requests)), key=lambda index: -len(joined[index])) if requests[index][2]]
        firsts = [max(1, len(joined[index]) - len(requests[index][2])) for index in asked]
        for index, scores in zip(asked, score_windows(self.session, [np.array(joined[i]) for i in asked], firsts), strict=True):
            answers[index] = (-float(scores.nats_S.sum()), bool(scores.greedy_S.all()))
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop strings, an id that ends texts, or its number of tokens."""
        answers = [""] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_options(request.args[1], self.max_gen_toks), []).append(index)
        for (until, max_tokens, *sampling), members in groups.items():
            for rows in _batched(members, self.session.batch):
                prompts = [requests[index].args[0] for index in rows]
                for index, text in zip(rows, self._generate(prompts, until, max_tokens, sampling), strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generate(self, prompts: list[str], until: Sequence[str], max_tokens: int, sampling: Sequence[Any]) -> list[str]:
        """Text after each prompt, of at most as many as the session has rows."""
        room = self.max_length - max_tokens
        if room < 1:
            raise InputError(f"{max_tokens} new tokens leave no room for a prompt in rows of {self.max_length}; raise max_length")
        ids = [(self.tok_encode(prompt) or [self.prefix_token_id])[-room:] for prompt in prompts]
        streams = [self.tokenizer.stream(until) for _ in prompts]
        texts = [""] * len(prompts)

        def take(row: int, token: int) -> bool:
            texts[row] += streams[row].push(token)
            return bool(streams[row].stopped)

        temperature, top_k, top_p = sampling
        self.session.generate(ids, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=self.seed, on_token=take)
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def _options(given: dict[str, Any], max_gen_toks: int) -> tuple[Any, ...]:
    """(stop strings, most new tokens, temperature, top_k, top_p) of a request's `generation_kwargs`; others are refused."""
    options = dict(normalize_gen_kwargs(given, max_gen_toks))
    until = tuple(stop for stop in options.pop("until") if stop)
    sampled = options.pop("do_sample", False)
    temperature = options.pop("temperature", 0.0)
    values = (
        options.pop("max_gen_toks"),
        temperature if sampled else 0.0,
        options.pop("top_k", None) or 0,
        options.pop("top_p", None) or 1.0,
    )
    if options:
        raise InputError(f"generation_kwargs: {next(iter(options))!r} is none of until, max_gen_toks, do_sample, temperature, top_k, top_p")
    return until, *values


def _batched(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """`items` in lists of `size`, the last of what is left."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
