"""What mutation.py mutates, which tests each file's mutants are run against, and why some mutants live."""

import shlex
from collections.abc import Iterator
from pathlib import Path

_OPS = "test_laws_ops.py test_ops_reference.py"
_REGISTRATION = "test_ops_registration.py"
_MODEL = "test_oracle_model.py test_model.py test_laws_models.py"
# The laws of whole models that need no export.
_LAWS = "in_place_equals or selected_logits or (any_split_of_padded and float64) or gradients_are_finite"

# File, or the folder of an op -> files of tests and an expression of pytest's -k: at most 15 s.
SUBSETS: dict[str, tuple[str, str]] = {
    "attention": (
        f"{_OPS} test_laws_attention.py {_REGISTRATION}",
        "attention and not rope and not window and not scored and not compiled and not (fake_kernel and form1)",
    ),
    "attention_rope": (f"{_OPS} {_REGISTRATION}", "attention and rope"),
    "causal_conv1d": (f"{_OPS} test_ops_mamba.py {_REGISTRATION}", "conv and not onnx and not compiled"),
    "expert_mix": (f"{_OPS} test_laws_experts.py {_REGISTRATION}", "mix or picks or experts_of"),
    "gated_rms_norm": (f"test_laws_ops.py test_ops_mamba.py test_laws_scans.py {_REGISTRATION}", "gated"),
    "keep_window_attention": (
        f"{_OPS} test_laws_attention.py {_REGISTRATION}",
        "(window or keep or slots) and not compiled and not (fake_kernel and not form3)",
    ),
    "linear": (f"test_laws_ops.py test_laws_linear.py {_REGISTRATION}", "linear and not 64_lengths"),
    "moe_mix": (
        f"test_laws_ops.py test_laws_experts.py test_moe.py {_REGISTRATION}",
        "(moe or mix) and not exported and not compiled and not jamba and not qwen",
    ),
    "product_key_topk": (f"{_OPS} test_laws_experts.py {_REGISTRATION}", "product or topk or sub_keys or halves"),
    "residual_rms_norm": (f"{_OPS} test_laws_scans.py {_REGISTRATION}", "norm or rms"),
    "rope": (
        f"{_OPS} test_laws_scans.py {_REGISTRATION}",
        "(rope or rotated) and not attention and not ssd and not angles and not form",
    ),
    "rope_angles": (
        f"{_OPS} test_laws_scans.py test_rope_scaling.py test_oracle_model.py {_REGISTRATION}",
        "(rope_angles or angles_equal or angles_are or frequencies or malformed or fake_kernel_agrees) and not oracle_s_own",
    ),
    "router_topk": (f"test_laws_ops.py test_laws_experts.py test_moe.py {_REGISTRATION}", "router and not exported"),
    "scored_attention": (
        f"test_scored_attention.py test_laws_ops.py test_laws_attention.py {_REGISTRATION}",
        "(scored or scores or share or free_cells) and not compiled and not (fake_kernel and not (binary and (form2 or form3)))",
    ),
    "selective_scan": (
        f"test_laws_ops.py test_laws_scans.py test_ops_mamba.py {_REGISTRATION}",
        "selective and not onnx and not compiled and not jamba",
    ),
    "ssd_scan": (f"{_OPS} test_laws_scans.py {_REGISTRATION}", "(ssd or scan) and not rope and not selective and not compiled"),
    "ssd_scan_rope": (f"{_OPS} test_laws_scans.py {_REGISTRATION}", "scan and rope"),
    "_registration.py": (
        f"{_OPS} test_ops_mamba.py test_scored_attention.py {_REGISTRATION}",
        "gradient or wrong or small or low_precision or expert_mix_equals",
    ),
    "attentions.py": (
        f"{_MODEL} test_parity_choices.py",
        f"(oracle_s and (attention or window or scores or inner) and not wrong and not heads) or told or {_LAWS}",
    ),
    "config.py": (
        f"{_MODEL} test_bundle.py",
        f"round_trip or cannot_be_read or positions or (oracle_s and (ends or options)) or {_LAWS}",
    ),
    "scans.py": (_MODEL, f"(oracle_s and (scans or mamba) and not wrong) or writes_into or {_LAWS}"),
    "feed_forwards.py": (_MODEL, f"(oracle_s and (moe or heads or ends) and not wrong and not tiny and not widths) or {_LAWS}"),
    "oracle.py": (f"test_params.py {_MODEL}", f"test_params or (oracle_s and (ends or options)) or {_LAWS}"),
    "params.py": (f"test_params.py {_MODEL}", f"test_params or (oracle_s and (ends or options)) or round_trip or counted or {_LAWS}"),
    "shapes.py": (_MODEL, f"before_any or (oracle_s and (ends or options)) or counts or counted or {_LAWS}"),
    "taps.py": (
        f"test_parity_choices.py test_moe.py test_selections.py {_MODEL}",
        "told or replay or (oracle_s and (moe or inner) and not tiny and not widths)",
    ),
    "upcycling.py": ("test_upcycle.py", "not onnx and not imported"),
    "module.py": ("test_model.py", "select_and_modules"),
    # The rest of the model.
    "": (_MODEL, f"before_any or keys_and_values or writes_into or (oracle_s and (ends or options or scaling) and not wrong) or {_LAWS}"),
}

_K = "kernels/wm_kernels"
_ALL_OR_NONE = "the check above lets all or none of them be None, so that one tells of all"
# (file, line, mutated line) of every mutant that lives -> why.
SURVIVORS: dict[tuple[str, str, str], str] = {
    (
        f"{_K}/_registration.py",
        "for index, grad in zip(wanted, found, strict=True):",
        "for index, grad in zip(wanted, found, strict=False):",
    ): "the two are of one length by construction: a gradient for each leaf that was asked for",
    (
        f"{_K}/attention/definition.py",
        "if cache_k_BKSP is None or cache_v_BKSP is None or position_B is None:",
        "if cache_k_BKSP is None and cache_v_BKSP is None or position_B is None:",
    ): _ALL_OR_NONE,
    (
        f"{_K}/expert_mix/definition.py",
        "GATHERED_ELEMENTS = 2**21  # entries of one table gathered at a time: 8 MB in float32, about a core's share of cache",
        "GATHERED_ELEMENTS = 2%21  # entries of one table gathered at a time: 8 MB in float32, about a core's share of cache",
    ): "tokens are taken one by one: slower, and the same sums",
    (
        f"{_K}/attention_rope/definition.py",
        "if cache_k_BKSP is None or cache_v_BKSP is None or position_B is None:",
        "if cache_k_BKSP is None or cache_v_BKSP is None and position_B is None:",
    ): _ALL_OR_NONE,
    (
        f"{_K}/expert_mix/definition.py",
        "GATHERED_ELEMENTS = 2**21  # entries of one table gathered at a time: 8 MB in float32, about a core's share of cache",
        "GATHERED_ELEMENTS = 2*21  # entries of one table gathered at a time: 8 MB in float32, about a core's share of cache",
    ): "tokens are taken one by one: slower, and the same sums",
    (
        f"{_K}/keep_window_attention/slots.py",
        "MASK_ELEMENTS = 2**23  # entries of one mask held at a time",
        "MASK_ELEMENTS = 2-23  # entries of one mask held at a time",
    ): "queries are taken one by one: slower, and the same sums",
    (
        f"{_K}/scored_attention/definition.py",
        "if cache_k_BKSP is None or cache_v_BKSP is None or cache_score_BAS is None or position_B is None:",
        "if cache_k_BKSP is None or cache_v_BKSP is None or cache_score_BAS is None and position_B is None:",
    ): _ALL_OR_NONE,
    (
        "wm_graph/attentions.py",
        'rank_BTA = None if context.taps is None else context.taps.rank(scope, "scored_attention", arguments[3])',
        'rank_BTA = None if context.taps is None else context.taps.rank(scope, "scored_attention", arguments[ 4])',
    ): "without a dtype to go by, the told scores stay as they are, and they are only compared with each other",
    (
        "wm_graph/blocks.py",
        "if params.feed_forward is None or params.feed_forward_norm is None:",
        "if params.feed_forward is None and params.feed_forward_norm is None:",
    ): "a layer has both or none",
    (
        "wm_graph/blocks.py",
        "return F.embedding((select_BS + row_B.unsqueeze(-1)).reshape(-1), x_MD)",
        "return F.embedding((select_BS + row_B.unsqueeze(1)).reshape(-1), x_MD)",
    ): "row_B has one dimension: a new second one is the last",
    (
        "wm_graph/feed_forwards.py",
        "if params.shared_in is None or params.shared_out is None or params.shared_gate is None:",
        "if params.shared_in is None or params.shared_out is None and params.shared_gate is None:",
    ): "a layer has all three or none: its form says which, and `params_from_flat` refuses others",
    (
        "wm_graph/params.py",
        'return name.rsplit(".", 1)[-1] in ("A_log", "A")',
        'return name.rsplit(".", 2)[-1] in ("A_log", "A")',
    ): "the last part is the same, however many come off",
    (
        "wm_graph/params.py",
        'tensors = {name: draw(name.rsplit(".", 1)[-1], shape, generator) for name, shape in parameter_shapes(cfg).items()}',
        'tensors = {name: draw(name.rsplit(".", 2)[-1], shape, generator) for name, shape in parameter_shapes(cfg).items()}',
    ): "the last part is the same, however many come off",
    (
        f"{_K}/keep_window_attention/definition.py",
        "if slot_k_BKWP is None or slot_v_BKWP is None or slot_score_BKW is None or slot_position_BKW is None:",
        "if slot_k_BKWP is None or slot_v_BKWP is None or slot_score_BKW is None and slot_position_BKW is None:",
    ): _ALL_OR_NONE,
    (
        f"{_K}/keep_window_attention/slots.py",
        "later_BK1 = token.position_BKS > slots.position_BKS.gather(2, index_BK1)",
        "later_BK1 = token.position_BKS >= slots.position_BKS.gather(2, index_BK1)",
    ): "a new token is never at the position of a slot",
    (
        f"{_K}/moe_mix/definition.py",
        "for e, pick_N in _by_expert(expert_Mk, in_EFD.shape[0]):",
        "for e, pick_N in _by_expert(expert_Mk, in_EFD.shape[ 1]):",
    ): "the number only adds experts that nobody chose to the counts, and those are passed over",
    (
        f"{_K}/selective_scan/definition.py",
        "if T == 1:",
        "if T == 0:",
    ): "the short way for one token gives what the way for many gives, sooner",
    (
        "wm_graph/feed_forwards.py",
        "if params.shared_in is None or params.shared_out is None or params.shared_gate is None:",
        "if params.shared_in is None and params.shared_out is None or params.shared_gate is None:",
    ): "a layer has all three or none: its form says which, and `params_from_flat` refuses others",
    (
        "wm_graph/scans.py",
        "dt_MR, B_MN, C_MN = F.linear(x_MC, params.x_proj).split([cfg.dt_rank, N, N], -1)",
        "dt_MR, B_MN, C_MN = F.linear(x_MC, params.x_proj).split([cfg.dt_rank, N, N], 1)",
    ): "x_MC has two dimensions: 1 is the last one",
    (
        "wm_graph/scans.py",
        "if params.dt_norm is not None and params.B_norm is not None and params.C_norm is not None:",
        "if params.dt_norm is not None and params.B_norm is not None or params.C_norm is not None:",
    ): "a layer has all three or none: `mamba1_norm` says which, and `params_from_flat` refuses others",
    (
        "wm_graph/taps.py",
        "weight_Mk = torch.softmax(logits_ME, -1).gather(-1, expert_Mk)",
        "weight_Mk = torch.softmax(logits_ME, 1).gather(-1, expert_Mk)",
    ): "logits_ME has two dimensions: 1 is the last one",
    (
        "wm_graph/upcycling.py",
        'fresh = torch.zeros(shape) if name.endswith(".expert_up") else draw(name.rsplit(".", 1)[-1], shape, generator)',
        'fresh = torch.zeros(shape) if name.endswith(".expert_up") else draw(name.rsplit(".", 1)[1], shape, generator)',
    ): "the names of new tensors have dots: the part after the last one is both the last and the second of two",
}

_MODEL_FILES = "attentions blocks config context feed_forwards model module oracle params scans shapes state taps upcycling"


def sources(root: Path) -> Iterator[str]:
    """The files that are mutated: the references, what they share, and what of the model computes numbers."""
    kernels = root / "kernels" / "wm_kernels"
    files = [kernels / "_registration.py", *kernels.glob("*/definition.py"), *kernels.glob("*/slots.py")]
    files += [root / "wm_graph" / f"{name}.py" for name in _MODEL_FILES.split()]
    return (path.relative_to(root).as_posix() for path in sorted(files))


def subset(path: str) -> tuple[str, ...]:
    """Arguments of pytest for the mutants of a file."""
    file = Path(path)
    files, expression = SUBSETS.get(file.parent.name) or SUBSETS.get(file.name) or SUBSETS[""]
    return (*(f"tests/{name}" for name in shlex.split(files)), "-k", expression)
