"""Small calls of every op's CUDA kernels, for compute-sanitizer: `make test-gpu-memory`.

Every regime that lengths decide is among them: single steps, prompts of one chunk and of several, segments of chunks side by side.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from test_ops_registration import plain_calls, state_calls
from wm_kernels import numerics

LENGTHS = (1, 37, 600, 5000)
LONG = ("scan", "scan rope", "selective", "conv", "keep")  # beyond 600 tokens the others do the same again


FLOAT32 = ("dt_", "A_", "state_", "score_", "slot_score_", "cache_score_", "cos_", "sin_")  # whatever the model's dtype


def on_cuda(op: Any, call: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments on the device, those that have the model's dtype in it."""
    made = []
    for argument, value in zip(op._opoverload._schema.arguments, call, strict=False):
        if isinstance(value, torch.Tensor):
            follows = value.is_floating_point() and not argument.name.startswith(FLOAT32)
            made.append(value.to("cuda", dtype if follows else value.dtype))
        else:
            made.append(value)
    return tuple(made)


def calls() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, op, arguments in float32)."""
    for tokens in LENGTHS:
        if tokens <= 600:
            yield from ((name, op, call) for name, (op, call) in plain_calls(T=tokens).items())
        for state in (False, True):
            for name, (op, in_place, call) in state_calls(tokens, state, state).items():
                if tokens <= 60 or name in LONG:  # caches of these calls hold 80 tokens
                    yield f"{name}, {tokens} tokens", in_place if state else op, call


def main() -> None:
    """All calls, or some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dtypes", nargs="*", default=["float32", "bfloat16", "float16"], help="default all that have kernels")
    parser.add_argument("--only", default="", help="calls whose names hold this")
    given = parser.parse_args()
    for dtype in (getattr(torch, name) for name in given.dtypes):
        for name, op, call in calls():
            for mode in ("fast", "exact") if given.only in name else ():
                print(dtype, name, mode, flush=True)
                with numerics(mode):
                    op(*on_cuda(op, call, dtype))
                torch.cuda.synchronize()
    print("every op was called" if not given.only else f"every call of {given.only} was made")


if __name__ == "__main__":
    main()
