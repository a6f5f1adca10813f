"""Random values of one case, all from its seed. B rows   T tokens   F rotated pairs"""

import numpy as np
import torch
from torch import Tensor

import wm_kernels as wm

PATTERNS = ("normal", "repeated", "zeros", "spread", "grid")
STEPS = ("softplus", "zeros", "to_40", "spread")
SCORES = ("ties", "normal", "equal", "rising", "falling", "large")

Valid = tuple[int, ...] | None


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values))


class Values:
    """Random arrays of one case."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Tensor:
        return tensor(self.rng.standard_normal(shape))

    def tokens(self, pattern: str, *shape: int, axis: int = 1, magnitude: int = 0) -> Tensor:
        """Values along a token axis.

        normal; all tokens equal to the first; about half of them exact zeros; of magnitudes 2^-6 to 2^6; halves from -2 to 2, whose
        products and sums are exact and often equal. All times 2^magnitude.
        """
        x = self.rng.standard_normal(shape)
        per_token = [n if i <= axis else 1 for i, n in enumerate(shape)]
        if pattern == "repeated":
            x = np.broadcast_to(np.take(x, [0], axis), shape).copy()
        if pattern == "zeros":
            x = np.where(self.rng.random(per_token) < 0.5, 0.0, x)
        if pattern == "spread":
            x = x * 2.0 ** self.rng.integers(-6, 7, per_token)
        if pattern == "grid":
            x = np.clip(np.round(2 * x) / 2, -2, 2)
        return tensor(x * 2.0**magnitude)

    def steps(self, kind: str, *shape: int) -> Tensor:
        """dt: softplus of normal values; half of them exact zeros; 0 to 40; 1e-4 to 40 in even ratios."""
        dt = np.log1p(np.exp(2 * self.rng.standard_normal(shape)))
        if kind == "zeros":
            dt = np.where(self.rng.random(shape) < 0.5, 0.0, dt)
        if kind == "to_40":
            dt = 40 * self.rng.random(shape)
        if kind == "spread":
            dt = 10.0 ** self.rng.uniform(-4, np.log10(40), shape)
        return tensor(dt)

    def decays(self, *shape: int) -> Tensor:
        """A, from -0.05 to -16."""
        return tensor(-np.exp(self.rng.uniform(-3, 2.77, shape)))

    def scores(self, kind: str, *shape: int) -> Tensor:
        """Scores of keys along axis 1: whole numbers with many ties, some of them 1; normal; all equal; sorted; up to 30."""
        score = self.rng.standard_normal(shape)
        if kind in ("ties", "large"):
            score = np.round(2 * score)
        if kind == "equal":
            score = np.full(shape, np.round(score.flat[0]))
        if kind in ("rising", "falling"):
            score = np.sort(score, 1)[:, :: 1 if kind == "rising" else -1]
        return tensor(np.clip(6 * score, -30, 30) if kind == "large" else score)

    def up_to(self, limit: int, rows: int) -> Tensor:
        """A whole number per row, the first of them `limit`."""
        return torch.tensor([limit, *self.rng.integers(0, limit + 1, rows - 1)], dtype=torch.int64)

    def whole(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers below `limit`."""
        return tensor(self.rng.integers(0, limit, shape))


def valid_B(valid: Valid) -> Tensor | None:
    return None if valid is None else torch.tensor(valid, dtype=torch.int64)


def angles(position_BT: Tensor, pairs: int) -> dict[str, Tensor]:
    return dict(zip(("cos_BTF", "sin_BTF"), wm.rope_angles(position_BT, pairs, 1e4, True), strict=True))
