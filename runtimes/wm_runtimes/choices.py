"""Runs that tell their choices: eager by the model's taps, sessions by what is recorded of their ops.

B rows, T tokens, S selected tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from wm_graph.config import ModelConfig
from wm_graph.model import forward
from wm_graph.params import Params
from wm_graph.state import State, zero_state
from wm_graph.taps import Taps
from wm_runtimes.choice_names import selecting_calls
from wm_runtimes.draws import Array, Choices, Draws, SessionRunner, Trace, run_draws
from wm_runtimes.labels import runs_graphs
from wm_runtimes.session import Session
from wm_runtimes.tap_runners import PromotedValues, RecordedOps


class EagerRunner:
    """`forward` with functional state and taps: the yardstick.

    Args:
        cfg: the model.
        params: its parameters, in the dtype to run at.
        capacity: most tokens per row.
        names: taps to tell.
    """

    def __init__(self, cfg: ModelConfig, params: Params, capacity: int, names: Iterable[str]) -> None:
        self._cfg, self._params, self._capacity = cfg, params, capacity
        self._state: State | None = None
        self._wanted = frozenset(names)

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        self._state = zero_state(self._cfg, len(tokens_BT), self._capacity, self._params.norm.dtype)
        return self.extend(tokens_BT, valid_B, select_BS)

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        rows = len(tokens_B)
        logits_B1V, choices = self.extend(tokens_B[:, None], np.ones(rows, np.int64), np.zeros((rows, 1), np.int64))
        return logits_B1V[:, 0], choices

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        tokens, valid, select = (torch.from_numpy(np.ascontiguousarray(array)) for array in (tokens_BT, valid_B, select_BS))
        taps = Taps(only=self._wanted.__contains__)
        with torch.no_grad():
            logits, self._state = forward(self._cfg, self._params, tokens, self._state, valid, select, taps=taps)
        return logits.numpy(), {name: value.numpy() for name, value in taps.values.items()}


class TellingSession:
    """A session whose answer to draws tells the choices it made.

    Args:
        session: the session.
        names: taps to tell, `choice_names`; none makes this a plain run.
        options: what the session was opened with.
    """

    def __init__(self, session: Session, names: Iterable[str], options: Mapping[str, Any]) -> None:
        self._session, self._names = session, tuple(names)
        self._promoted: PromotedValues | None = None
        if self._names and runs_graphs(session.runtime):
            self._promoted = PromotedValues(session.bundle, session.batch, session.capacity, self._names, session.runtime, **options)

    def close(self) -> None:
        """Close the session."""
        self._promoted = None
        self._session.close()

    def run(self, draws: Draws) -> Trace:
        """The session's logits and times, and its choices."""
        plain = SessionRunner(self._session)
        if not self._names:
            return run_draws(plain, draws)
        if self._promoted is not None:
            return replace(run_draws(plain, draws), choices=run_draws(self._promoted, draws).choices)
        runner = RecordedOps(plain, self._names, selecting_calls(self._session.bundle.config))
        with runner.recording():
            return run_draws(runner, draws)
