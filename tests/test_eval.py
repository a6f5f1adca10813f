"""`wm eval`: perplexity by length of context, against computations that share nothing with it."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cli_support import wm
from helpers import FAMILIES, sharp_params
from wm_export import export_bundle
from wm_graph import forward, save_checkpoint
from wm_graph.data import tokenizer_path
from wm_graph.errors import InputError
from wm_graph.params import cast_params, map_tensors
from wm_graph.tolerances import model_limit
from wm_runtimes import evaluate, open_bundle, open_session
from wm_runtimes.evaluate import cut_windows, default_edges, evaluate_text, score_logits, score_windows

# A scan, and a window that the longer contexts overflow; bytes and three special tokens, and a few ids that no text has.
CFG = replace(FAMILIES["cheems-tiny"], layers=(("ssd", "mlp"), ("dynamic_mask_attention", "mlp")), vocab_size=300, tie_embeddings=False)
TEXT = "Ein Satz – a sentence, 文 und so weiter.\r\nThen another one of no more sense than the first.\n" * 3
IDS = [3 + byte for byte in TEXT.encode()]
BOS = 1
LN2 = 0.6931471805599453


def make(folder, params, *, add_bos):
    tokens = {"bos": BOS, "eos": 2, "pad": 0, "stop": [2], "add_bos": add_bos}
    extra = {"tokenizer.json": tokenizer_path().read_text(encoding="utf-8"), "generation.json": json.dumps({"tokens": tokens})}
    save_checkpoint(folder / "checkpoint", CFG, params, extra)
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same model in a bundle whose texts begin with bos, and in one whose texts do not."""
    folder = tmp_path_factory.mktemp("eval")
    return {add_bos: make(folder / str(add_bos), sharp_params(CFG), add_bos=add_bos) for add_bos in (True, False)}


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles[False]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path / "text.txt"


def windows_of(context, add_bos):
    head = [BOS] if add_bos else []
    return [head + IDS[start : start + context] for start in range(0, len(IDS), context)]


def cross_entropies(window):
    """Of the tokens of a window after the first, by torch's cross-entropy of the model in float64 over the window at once."""
    params = cast_params(sharp_params(CFG), torch.float64)
    with torch.no_grad():
        logits_1TV, _ = forward(CFG, params, torch.tensor([window[:-1]]))
    return torch.nn.functional.cross_entropy(logits_1TV[0].double(), torch.tensor(window[1:]), reduction="none").numpy()


def per_token(runtime):
    """How far a token's negative log likelihood may be off: that of its logit, and that of the logarithm of the sum."""
    scale = 2.0  # rms of these logits, at most
    return 2 * scale * model_limit("float32", runtime).max_abs


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("context", [50, 100, 1000])
def test_nats_are_the_cross_entropy_of_eager_in_float64(bundles, add_bos, context):
    windows = [window for window in windows_of(context, add_bos) if len(window) > 1]
    expected = [cross_entropies(window) for window in windows]
    got = evaluate_text(open_bundle(bundles[add_bos]), TEXT, context=context, batch=3)
    assert got.windows == len(windows)
    assert got.tokens == sum(map(len, expected)) == len(IDS) - (0 if add_bos else len(windows))
    assert got.nats_per_token == pytest.approx(sum(map(np.sum, expected)) / got.tokens, abs=per_token("onnxruntime-cpu"))
    assert got.perplexity == pytest.approx(math.exp(got.nats_per_token), rel=1e-12)


def test_each_token_has_its_own_cross_entropy(bundle):
    windows = [np.array(window) for window in windows_of(70, False)]
    with open_session(bundle, "eager", batch=len(windows), capacity=70) as session:
        for window, scores in zip(windows, score_windows(session, windows), strict=True):
            np.testing.assert_allclose(scores.nats_S, cross_entropies(window.tolist()), rtol=0, atol=per_token("eager"))


def test_a_model_of_constant_logits_needs_the_logarithm_of_its_vocabulary(tmp_path):
    zeroed = map_tensors(sharp_params(CFG), lambda name, tensor: tensor * 0 if name == "head" else tensor)
    got = evaluate_text(open_bundle(make(tmp_path, zeroed, add_bos=True)), TEXT, context=64)
    assert got.nats_per_token == pytest.approx(math.log(CFG.vocab_size), rel=1e-14)
    assert got.perplexity == pytest.approx(CFG.vocab_size, rel=1e-13)
    # One token per byte here, and all of them are scored.
    assert got.bits_per_byte == pytest.approx(math.log2(CFG.vocab_size), rel=1e-13)
    assert all(bucket.perplexity == pytest.approx(CFG.vocab_size, rel=1e-13) for bucket in got.buckets)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
def test_runtimes_agree(bundle):
    runtimes = ("eager", "onnxruntime-cpu", "onnxruntime-cpu:model.onnx", "compiled")
    eager, *others = (evaluate_text(open_bundle(bundle), TEXT, runtime, context=100, batch=2) for runtime in runtimes)
    for runtime, other in zip(runtimes[1:], others, strict=True):
        limit = per_token("eager") + per_token(runtime.partition(":")[0])
        assert other.tokens == eager.tokens
        for one, reference in zip(other.buckets, eager.buckets, strict=True):
            assert one.nats_per_token == pytest.approx(reference.nats_per_token, abs=limit)


@pytest.mark.parametrize(("batch", "piece"), [(1, None), (2, 7), (3, 1), (100, 64)])
def test_rows_and_pieces_do_not_change_the_sum(bundle, batch, piece):
    opened = open_bundle(bundle)
    whole = evaluate_text(opened, TEXT, context=90, batch=1, piece=1000)
    got = evaluate_text(opened, TEXT, context=90, batch=batch, piece=piece)
    assert (got.tokens, got.windows) == (whole.tokens, whole.windows)
    assert got.nats == pytest.approx(whole.nats, rel=1e-5)


def test_a_context_past_the_text_does_not_change_the_sum(bundle):
    results = [evaluate_text(open_bundle(bundle), TEXT, context=context) for context in (len(IDS), len(IDS) + 1, 2048, None)]
    assert {(result.nats, result.windows, result.buckets) for result in results} == {
        (results[0].nats, 1, results[0].buckets),
    }


def test_no_call_asks_for_more_logits_than_the_bound(bundle, monkeypatch):
    sizes = []
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 20 * CFG.vocab_size)
    windows = [np.array(window) for window in windows_of(90, False)]
    with open_session(bundle, batch=3, capacity=100) as session:
        prefill = session.prefill
        monkeypatch.setattr(session, "prefill", lambda *given: sizes.append(given[3].size) or prefill(*given))
        score_windows(session, windows)
    assert max(sizes) == 18  # three rows of six tokens
    assert len(sizes) > len(windows)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("edges", [(1,), (2, 3, 5, 8), (40, 50), (49,), (50,), (51,), (1000,), None])
def test_buckets_partition_the_tokens(bundles, add_bos, edges):
    got = evaluate_text(open_bundle(bundles[add_bos]), TEXT, context=50, edges=edges)
    assert [bucket.first for bucket in got.buckets] == [1, *(bucket.last + 1 for bucket in got.buckets[:-1])]
    assert got.buckets[-1].last == (50 if add_bos else 49)
    assert {bucket.last for bucket in got.buckets[:-1]} <= set(edges or default_edges(50))
    assert all(bucket.tokens > 0 for bucket in got.buckets)
    assert sum(bucket.tokens for bucket in got.buckets) == got.tokens
    mean = sum(bucket.tokens * bucket.nats_per_token for bucket in got.buckets) / got.tokens
    assert mean == pytest.approx(got.nats_per_token, rel=1e-12)


def test_a_bucket_holds_the_tokens_of_its_lengths_of_context(bundle):
    expected = [cross_entropies(window) for window in windows_of(80, False)]
    inside = np.concatenate([nats[19:30] for nats in expected])  # entry i has i + 1 tokens before it
    bucket = evaluate_text(open_bundle(bundle), TEXT, context=80, edges=(19, 30)).buckets[1]
    assert (bucket.first, bucket.last, bucket.tokens) == (20, 30, len(inside))
    assert bucket.nats_per_token == pytest.approx(inside.mean(), abs=per_token("onnxruntime-cpu"))


def test_default_buckets_end_at_powers_of_two():
    assert default_edges(2048) == (16, 32, 64, 128, 256, 512, 1024, 2048)
    assert default_edges(100) == (16, 32, 64)
    assert default_edges(5) == (5,)


@pytest.mark.parametrize("add_bos", [True, False])
def test_bits_per_byte_count_bytes_of_utf_8(bundles, add_bos):
    got = evaluate_text(open_bundle(bundles[add_bos]), TEXT, context=64)
    assert len(TEXT) < got.text_bytes == len(TEXT.encode())
    assert got.bits_per_byte == pytest.approx(got.nats_per_token / LN2 / got.text_bytes * len(IDS), rel=1e-12)


def test_scores_from_a_later_token_on_are_the_last_of_all_scores(bundle):
    windows = [np.array(IDS[:40]), np.array(IDS[5:12]), np.array(IDS[7:60]), np.array(IDS[9:11])]
    firsts = [30, 6, 1, 1]
    with open_session(bundle, batch=3, capacity=64) as session:
        every = score_windows(session, windows, piece=9)
        some = score_windows(session, windows, firsts, piece=9)
        assert not session.position.any()
    for all_scores, scores, first in zip(every, some, firsts, strict=True):
        np.testing.assert_allclose(scores.nats_S, all_scores.nats_S[first - 1 :], rtol=1e-5)
        np.testing.assert_array_equal(scores.greedy_S, all_scores.greedy_S[first - 1 :])


def test_greedy_tokens_are_those_that_generation_chooses(bundle):
    with open_session(bundle, batch=1, capacity=64) as session:
        (chosen,) = session.generate([IDS[:20]], 20, stop_ids=[])
        (scores,) = score_windows(session, [np.array(IDS[:20] + chosen)], [20])
        (other,) = score_windows(session, [np.array([*IDS[:20], (chosen[0] + 1) % CFG.vocab_size])], [20])
    assert scores.greedy_S.all()
    assert not other.greedy_S.any()


def test_logits_of_any_size_are_scored_in_float64():
    logits_SV = np.array([[1e4, -1e4, 0.0], [3e38, 3e38, -np.inf], [0.0, 1e-7, -np.inf]], np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits_SV).double(), -1).neg().numpy()
    for token in range(3):
        np.testing.assert_allclose(score_logits(logits_SV, np.full(3, token)).nats_S, expected[:, token], rtol=1e-15, atol=1e-300)
    assert score_logits(logits_SV, np.array([0, 1, 1])).greedy_S.tolist() == [True, False, True]


def test_an_excluded_token_is_infinitely_surprising_and_still_json():
    bucket = evaluate.Bucket(1, math.inf, 1, 1)
    result = evaluate.Evaluation(1, math.inf, 1, 1, 2, 1, (bucket,))
    assert result.perplexity == bucket.perplexity == math.inf
    assert evaluate.perplexity(1e6) == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["perplexity"] is None


def test_windows_hold_every_token_once():
    assert [window.tolist() for window in cut_windows(range(3, 8), 2)] == [[3, 4], [5, 6]]
    assert [window.tolist() for window in cut_windows(range(3, 8), 2, bos=1)] == [[1, 3, 4], [1, 5, 6], [1, 7]]
    for ids, bos in (([], None), ([], 1), ([5], None)):
        with pytest.raises(InputError, match="expected at least"):
            cut_windows(ids, 2, bos)


def test_a_piece_below_one_is_refused(bundle):
    with pytest.raises(InputError, match="piece"):
        evaluate_text(open_bundle(bundle), TEXT, piece=0)


def test_the_command_prints_what_python_gives(capfd, bundle, file):
    expected = evaluate_text(open_bundle(bundle), TEXT, "eager", context=100, edges=(10, 50), batch=2)
    argv = ("eval", bundle, "--text", file, "--runtime", "eager", "--context", 100, "--buckets", "10,50", "--batch", 2)
    result = wm(capfd, *argv, "--json")
    assert (result.code, result.err) == (0, "")
    what = {"bundle": str(bundle), "name": CFG.name, "dtype": "float32", "runtime": "eager", "text": str(file)}
    assert result.json == what | expected.to_dict()
    lines = wm(capfd, *argv).out.splitlines()
    assert f"perplexity  {expected.perplexity:.6g}" in lines
    table = [line.split() for line in lines[lines.index("") + 1 : -1]]
    assert [row[0] for row in table] == ["context", "1-10", "11-50", "51-99", "all"]
    assert [int(row[1]) for row in table[1:]] == [*(bucket.tokens for bucket in expected.buckets), expected.tokens]


def test_the_command_in_onnxruntime_loads_neither_torch_nor_onnx(bundle, file):
    script = (
        "import sys; from wm_graph.cli import run; code = run(sys.argv[1:]); sys.exit(code or bool({'torch', 'onnx'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", script, "eval", bundle, "--text", file, "--context", "64"]
    result = subprocess.run(list(map(str, argv)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
