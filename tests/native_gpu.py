"""Native kernels on a GPU: plans of all cases compiled for it, values for their calls, and calls through libwm_kernels."""

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from native_cases import CONFIGURATIONS, declaration, use_of
from wm_kernels.native import Use, shape_of
from wm_runtimes.native_kernels import DeviceTensor, NativeKernels, NativeOp

KERNELS = "WM_NATIVE_TEST_KERNELS"  # a folder for the compiled kernels, which later runs find there
# Steps, prompts of one chunk and of several. M rows of ops without a time axis, S cells.
SIZES = (
    {"B": 1, "T": 1, "M": 1, "S": 64},
    {"B": 3, "T": 1, "M": 5, "S": 1000},
    {"B": 2, "T": 37, "M": 333, "S": 64},
    {"B": 1, "T": 600, "M": 2049, "S": 1024},
    {"B": 2, "T": 2500, "M": 4096, "S": 4096},
)
HALF = ("residual_rms_norm", "causal_conv1d", "moe_mix", "ssd_scan_rope", "attention_rope", "linear")  # also in float16
SINGLE = ("rope", "rope_angles", "router_topk", "expert_mix", "selective_scan", "linear")  # also in float32
CASES = [
    *((op, index, torch.bfloat16) for op, every in CONFIGURATIONS.items() for index in range(len(every))),
    *((op, 0, torch.float16) for op in HALF),
    *((op, 0, torch.float32) for op in SINGLE),
]


def capability() -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def compiled(folder: Path) -> Path:
    """The kernels of all cases for this GPU in `folder`, where they are compiled once, whichever process comes first."""
    from wm_export.native import write_native

    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "plans.json").is_file():  # written last
            folder.mkdir(exist_ok=True)
            write_native([use_of(*case) for case in CASES], [capability()], folder)
    return folder


def named_folder() -> Path | None:
    """The folder that the environment names for compiled kernels."""
    named = os.environ.get(KERNELS)
    return Path(named) if named else None


def values_of(use: Use, sizes: Mapping[str, int], seed: int, device: str = "cuda") -> dict[str, Tensor]:
    """Values that a call may have, drawn on `device`."""
    every = {letter: sizes.get(letter, 0) if size is None else size for letter, size in use.sizes} | dict(use.plain)
    draw = torch.Generator(device).manual_seed(seed)
    position_B = _whole(draw, max(1, every.get("S", 4 * every.get("W", 0)) - every.get("T", 0) + 1), (every.get("B", 0),))
    made = {name: _drawn(name, shape_of(name, every), every, position_B, draw).to(dtype) for name, dtype in use.dtypes}
    if "slot_position_BKW" in made:
        empty_BKW = made["slot_position_BKW"] < 0
        made["slot_score_BKW"].masked_fill_(empty_BKW, -math.inf)
    return made


def _whole(draw: torch.Generator, limit: int, shape: Sequence[int]) -> Tensor:
    return torch.randint(0, limit, tuple(shape), generator=draw, device=draw.device)


def _drawn(name: str, shape: tuple[int, ...], every: Mapping[str, int], position_B: Tensor, draw: torch.Generator) -> Tensor:
    normal = (
        torch.randn(shape, generator=draw, device=draw.device)
        if name.split("_")[0] not in ("position", "valid", "expert", "length")
        else None
    )
    match name.rsplit("_", 1)[0]:
        case "position":
            return position_B if len(shape) == 1 else position_B[:, None] + torch.arange(shape[1], device=draw.device)
        case "length":
            return 1 + _whole(draw, 4096, shape)
        case "valid":
            return 1 + _whole(draw, every["T"], shape)
        case "expert":
            return _whole(draw, every["E"] if "E" in every else every["J"], shape)
        case "slot_position":  # the first positions, each once, then slots that are empty
            slot_W = torch.arange(shape[-1], device=draw.device)
            return torch.where(slot_W < position_B[:, None, None], slot_W, -1).expand(shape).contiguous()
    assert normal is not None
    if name == "weight_NK":
        return normal * shape[-1] ** -0.5
    match name.rsplit("_", 1)[0]:
        case "dt":
            return torch.nn.functional.softplus(normal)
        case "A":
            return -normal.exp()
        case "cos":
            return normal.cos()
        case "sin":
            return normal.sin()
        case "in" | "out" | "down" | "up" | "keys":  # matrices, whose products stay in float16's range
            return normal * shape[-1] ** -0.5
    return normal


def copied(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values elsewhere."""
    return {name: value.clone() for name, value in given.items()}


@contextmanager
def filled_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer: what a kernel leaves out, or reads too early, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class LibraryCall:
    """A call of an op through libwm_kernels, its outputs and scratch allocated, ready to be launched again and again.

    Args:
        kernels: the open folder.
        use: how the op is called.
        given: its inputs.
        in_place: whether outputs that may take the place of inputs do so.
    """

    def __init__(self, kernels: NativeKernels, use: Use, given: Mapping[str, Tensor], in_place: bool) -> None:
        declared = declaration(use.op)
        self.given = given
        inputs = [given.get(name) for name in declared.inputs]
        dtypes = [None if one is None else str(one.dtype).removeprefix("torch.") for one in inputs]
        self.op: NativeOp = kernels.op(f"wm::{use.op}", dict(use.plain), dtypes)
        self.inputs = [None if one is None else DeviceTensor.of(one) for one in inputs]
        self.outputs = []
        for output, (dtype, shape) in zip(declared.outputs, self.op.layouts(self.inputs), strict=True):
            aliased = given.get(output.alias) if in_place and output.alias else None
            self.outputs.append(torch.empty(shape, dtype=getattr(torch, dtype), device="cuda") if aliased is None else aliased)
        self.places = [DeviceTensor.of(one) for one in self.outputs]
        self.scratch = torch.empty(self.op.scratch_bytes(self.inputs, self.places), dtype=torch.uint8, device="cuda")

    def launch(self, stream: int | None = None) -> list[Tensor]:
        """Launch it on torch's current stream, or another."""
        place = torch.cuda.current_stream().cuda_stream if stream is None else stream
        self.op.launch(self.inputs, self.places, self.scratch.data_ptr(), self.scratch.numel(), place)
        return self.outputs


def bits(tensor: Tensor) -> Tensor:
    """Its bits, so that NaNs are equal and zeros of two signs are not."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole)


def same(found: Sequence[Tensor], expected: Sequence[Tensor], what: object) -> None:
    """Equal in every bit."""
    assert len(found) == len(expected)
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, what
        assert one.shape == other.shape, what
        differing = int((bits(one) != bits(other)).sum())
        assert not differing, f"{what}: output {place} differs in {differing} of {one.numel()} elements"
