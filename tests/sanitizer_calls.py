"""Calls of every op's CUDA kernels, for compute-sanitizer: `make test-gpu-memory`.

Small calls of every form, of one token and of several lengths, then those of sanitizer_regimes.py: together every regime of every op's
plans on sm_90, as tests/test_sanitizer_calls.py proves. Every tensor has an allocation of its own, scratch too, whose ends are watched;
`--planted` overruns one by an element, which memcheck must see.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor has an allocation of its own

import torch

import sanitizer_regimes
from test_ops_registration import plain_calls, state_calls
from wm_kernels import numerics, triton_launch

LENGTHS = (1, 37, 600)
LONG = ("scan", "scan rope", "selective", "conv", "keep")  # caches of the others hold 80 tokens
CACHED = 60  # tokens that these have room for
FLOAT32 = ("dt_", "A_", "state_", "score_", "slot_score_", "cache_score_", "cos_", "sin_")  # whatever the model's dtype


def placed(op: Any, call: tuple[Any, ...], dtype: torch.dtype, place: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, ...]:
    """The arguments where `place` puts them, those that have the model's dtype in it."""
    made = []
    for argument, value in zip(op._schema.arguments, call, strict=False):
        if isinstance(value, torch.Tensor):
            follows = value.is_floating_point() and not argument.name.startswith(FLOAT32)
            made.append(place(value.to(dtype) if follows else value))
        else:
            made.append(value)
    return tuple(made)


def small_calls() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, op, arguments in float32)."""
    for tokens in LENGTHS:
        yield from ((f"{name}, {tokens} tokens", op._opoverload, call) for name, (op, call) in plain_calls(T=tokens).items())
        for state in (False, True):
            for name, (op, in_place, call) in state_calls(tokens, state, state).items():
                if tokens <= CACHED or name in LONG:
                    yield f"{name}, {tokens} tokens", (in_place if state else op)._opoverload, call


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[str, ...]]]:
    """(name, op, arguments, modes of numerics)."""
    for name, op, call in small_calls():
        yield name, op, call, ("fast", "exact")
    for name, op, call in sanitizer_regimes.calls(dtype):
        tokens = call[0].shape[1] if call[0].dim() > 2 else 1
        yield name, op, call, ("fast", "exact") if tokens <= sanitizer_regimes.LONGEST else ("fast",)


def scratch_apart(plan: triton_launch.Plan, tensors: Any, device: torch.device) -> None:
    """Every run as a plan's first one, which allocates each scratch by itself; in later ones, one lies beside the other."""
    triton_launch._first_run(plan, {**tensors, **triton_launch._scratch(plan, device)}, device.index)


def run_planted() -> None:
    """The overrun."""
    from planted_overrun import PLAN

    triton_launch.run(PLAN, {"any": torch.zeros(1, device="cuda")})
    torch.cuda.synchronize()


def run_all(dtype: torch.dtype, only: str) -> None:
    """All calls of a dtype whose names hold `only`."""
    for name, op, call, modes in calls(dtype):
        for mode in modes if only in name else ():
            print(dtype, name, mode, flush=True)
            with numerics(mode):
                op(*placed(op, call, dtype, torch.Tensor.cuda))
            torch.cuda.synchronize()
    for name, plan, tensors in sanitizer_regimes.plans(dtype):
        if only in name:
            print(dtype, name, flush=True)
            triton_launch.run(plan, {key: value.cuda() for key, value in tensors.items()})
            torch.cuda.synchronize()


def main() -> None:
    """All calls, or some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dtypes", nargs="*", default=["float32", "bfloat16", "float16"], help="default all that have kernels")
    parser.add_argument("--only", default="", help="calls whose names hold this")
    parser.add_argument("--planted", action="store_true", help="launch a kernel that writes past the end of a tensor, and nothing else")
    given = parser.parse_args()
    triton_launch._run_on_cuda = scratch_apart
    if given.planted:
        return run_planted()
    for dtype in given.dtypes:
        run_all(getattr(torch, dtype), given.only)
    print("every op was called" if not given.only else f"every call of {given.only} was made")


if __name__ == "__main__":
    main()
