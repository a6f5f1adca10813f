"""Native plans launched by Triton, by the names that their data has for tensors."""

from functools import partial

import torch

from native_cases import F32, I64, declaration
from wm_kernels.attention_rope.definition import attention_rope_reference
from wm_kernels.native import Call, Use, shape_of
from wm_kernels.scored_attention.definition import scored_attention_reference
from wm_kernels.triton_launch import architecture, run

B, S, H, K, P, F = 2, 48, 4, 2, 16, 6
SIZES = {"B": B, "S": S, "H": H, "K": K, "P": P, "F": F, "A": 4, "C": (H + 2 * K) * P}


def _drawn(names, T, dtype):
    draw = torch.Generator().manual_seed(T)
    made = {}
    for name in names:
        shape = shape_of(name, SIZES | {"T": T})
        stem = name.rsplit("_", 1)[0]
        if stem in ("position", "valid"):
            made[name] = torch.tensor([0, S - T] if stem == "position" else [T, T], dtype=I64)
        else:
            kind = F32 if stem in ("cos", "sin", "score", "cache_score") else dtype
            made[name] = torch.randn(shape, generator=draw).to(kind)
    return made


def attention_rope(T, dtype):
    plain = {"n_head": H, "n_kv_head": K, "head_dim": P}
    return _call("attention_rope", plain, T, dtype, partial(attention_rope_reference, **plain))


def scored_attention(T, dtype):
    plain = {"scoring": "binary", "ratio": 0.0}
    return _call("scored_attention", plain, T, dtype, partial(scored_attention_reference, **plain))


def _call(op, plain, T, dtype, reference):
    given = _drawn(declaration(op).inputs, T, dtype)
    letters = {letter for name in given for letter in name.rsplit("_", 1)[1]}
    sizes = tuple((letter, size) for letter, size in (SIZES | {"T": T}).items() if letter in letters)
    return Use(op, tuple(plain.items()), tuple((name, x.dtype) for name, x in given.items()), sizes), given, reference


def launched(use, given):
    """The outputs of the op's launches on copies of the state, in Triton's interpreter or on a GPU, where the tensors are."""
    declared, plain = declaration(use.op), dict(use.plain)
    device = next(iter(given.values())).device
    found = {letter: size for name, value in given.items() for letter, size in zip(name.rsplit("_", 1)[1], value.shape, strict=True)}
    sizes = found | dict(declared.sizes(plain))
    call = Call(sizes, dict(use.dtypes), plain, architecture(device), True)
    plan = declared.plan(call)
    tensors = {name: value.clone() for name, value in given.items()}
    outputs = []
    for output in declared.outputs:
        like = call.dtypes[output.like] if isinstance(output.like, str) else output.like
        fresh = torch.empty(shape_of(output.name, sizes), dtype=like, device=device)
        outputs.append(tensors.setdefault(output.name, tensors.get(output.alias, fresh)))
    names = {value for launch in plan.launches for value in launch.arguments if isinstance(value, str)} - set(plan.scratch)
    run(plan, {name: tensors[declared.name(name, call)] for name in names})
    return outputs


CALLS = {"attention_rope": attention_rope, "scored_attention": scored_attention}
