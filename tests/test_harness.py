"""A bundle as a model of lm-evaluation-harness, on tasks made here."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "wm-graph[eval]"')

from helpers import sharp_params
from test_eval import BOS, CFG, cross_entropies, make, per_token
from wm_graph.errors import BundleError, InputError, RuntimeUnavailableError, WmError
from wm_runtimes import open_session

# Of lm-eval and the libraries that it brings, not of this project.
pytestmark = [pytest.mark.filterwarnings("default")]

DOCS = [
    {"question": "The sky is", "choices": [" blue", " green", " a fish, and not a small one"], "answer": 0},
    {"question": "Two and two are ", "choices": ["five", "four"], "answer": 1},
    {"question": "文", "choices": [" und", " so weiter"], "answer": 0},
]
TASK = """\
task: wm_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make(tmp_path_factory.mktemp("harness"), sharp_params(CFG), add_bos=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a multiple-choice task over a file beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (folder / "wm_choice.yaml").write_text(TASK.format(file=folder / "docs.jsonl"))
    return folder


@pytest.fixture
def model(bundle):
    from wm_runtimes.harness import HarnessModel

    return lambda **options: HarnessModel(bundle, **options)


def ids_of(text):
    return [3 + byte for byte in text.encode()]


def ask(*requests):
    return [SimpleNamespace(args=request) for request in requests]


def expected_choices():
    """Negative log likelihood of each choice of each question, from the model in float64.

    The harness moves a question's trailing space to its choices: the bytes are the same, one more is scored.
    """
    found = []
    for doc in DOCS:
        known = len([BOS, *ids_of(doc["question"].rstrip())])
        found.append([cross_entropies([BOS, *ids_of(doc["question"] + choice)])[known - 1 :].sum() for choice in doc["choices"]])
    return found


@pytest.mark.parametrize(("runtime", "batch_size"), [("onnxruntime-cpu", 1), ("onnxruntime-cpu", 3), ("eager", 2)])
def test_likelihoods_of_continuations_are_those_of_float64(model, runtime, batch_size):
    requests = ask(*((doc["question"], choice) for doc in DOCS for choice in doc["choices"]))
    got = model(runtime=runtime, batch_size=batch_size, max_length=64).loglikelihood(requests)
    expected = np.concatenate(expected_choices())
    np.testing.assert_allclose([-nats for nats, _ in got], expected, rtol=0, atol=30 * per_token(runtime))


def test_a_greedy_continuation_is_told_from_another(model, bundle):
    with open_session(bundle, capacity=64) as session:
        (chosen,) = session.generate([[BOS, *ids_of("The")]], 1, stop_ids=[])
    lm = model(max_length=64)
    pairs = [(None, [BOS, *ids_of("The")], tail) for tail in (chosen, [(chosen[0] + 1) % CFG.vocab_size], [])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True, False, True]


def test_long_contexts_lose_their_beginning(model):
    ids = [BOS, *ids_of("a context that is longer than a row of the session")]
    ((got, _),) = model(max_length=16)._loglikelihood_tokens([(None, ids[:-3], ids[-3:])])
    assert -got == pytest.approx(cross_entropies(ids[-17:])[-3:].sum(), abs=3 * per_token("onnxruntime-cpu"))


@pytest.mark.parametrize("max_length", [1000, 20, 10])
def test_rolling_likelihood_predicts_every_token_once(model, max_length):
    text = "A text of some thirty bytes, or forty."
    ids = ids_of(text)
    expected = cross_entropies([BOS, *ids[:max_length]]).sum()
    for start in range(max_length, len(ids), max_length):
        end = min(start + max_length, len(ids))
        # A short last window reaches back, so that its tokens have as much context as a row holds.
        expected += cross_entropies(ids[end - max_length - 1 : end])[start - end :].sum()
    (got,) = model(max_length=max_length).loglikelihood_rolling(ask((text,)))
    assert -got == pytest.approx(expected, abs=len(text) * per_token("onnxruntime-cpu"))


def test_generated_text_is_that_of_the_session(model, bundle):
    prompts = ["The sky is", "Two", "文 und"]
    lm = model(batch_size=2, max_length=64)
    got = lm.generate_until(ask(*((prompt, {"until": [], "max_gen_toks": 12}) for prompt in prompts)))
    with open_session(bundle, capacity=64) as session:
        expected = [lm.tokenizer.decode(session.generate([[BOS, *ids_of(prompt)]], 12)[0]) for prompt in prompts]
    assert got == expected
    assert any(len(text) > 2 for text in got)
    stop = next(text for text in got if len(text) > 2)[1]
    cut = lm.generate_until(ask(*((prompt, {"until": [stop], "max_gen_toks": 12}) for prompt in prompts)))
    assert cut == [text.split(stop)[0] for text in expected]


def test_sampled_text_is_repeatable_and_obeys_its_options(model):
    asked = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0}
    lm = model(max_length=64)
    once, again = (lm.generate_until(ask(("The sky", asked))) for _ in range(2))
    assert once == again
    greedy = lm.generate_until(ask(("The sky", asked | {"top_k": 1})))
    assert greedy == lm.generate_until(ask(("The sky", {"until": [], "max_gen_toks": 8}))) != once


def test_texts_begin_with_one_bos(model):
    lm = model()
    assert lm.tok_encode("ab") == lm.tok_encode("<bos>ab") == lm.tok_encode("ab", add_special_tokens=True) == [BOS, *ids_of("ab")]
    assert lm.tok_encode("ab", add_special_tokens=False) == ids_of("ab")
    assert (lm.prefix_token_id, lm.eot_token_id) == (BOS, 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"runtime": "abacus"}, "abacus"),
        ({"batch_size": "auto"}, "batch_size"),
        ({"max_length": 1}, "context of 1"),
    ],
)
def test_wrong_arguments_are_refused(model, options, error):
    with pytest.raises(WmError, match=error):
        model(**options)


def test_wrong_requests_are_refused(model, tmp_path, monkeypatch):
    lm = model(max_length=16)
    for given, error in (({"max_gen_toks": 16}, "no room"), ({"num_beams": 2}, "num_beams")):
        with pytest.raises(InputError, match=error):
            lm.generate_until(ask(("a", given)))
    with pytest.raises(InputError, match="17 tokens"):
        lm.loglikelihood(ask(("a", "b" * 17)))
    with pytest.raises(InputError, match="chat template"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])
    from wm_runtimes.harness import HarnessModel

    with pytest.raises(BundleError):
        HarnessModel(tmp_path)
    monkeypatch.setattr("wm_runtimes.onnxruntime_cpu.availability", lambda runtime="": "its engine is out of coal")
    with pytest.raises(RuntimeUnavailableError, match="coal"):
        model()


def test_the_harness_runs_a_task_of_this_folder(bundle, tasks, tmp_path):
    """Its own command, offline: `python -m wm_runtimes.harness run --model wm-graph ...`."""
    argv = ["run", "--model", "wm-graph", "--model_args", f"bundle={bundle},runtime=onnxruntime-cpu,max_length=64", "--batch_size", "2"]
    argv += ["--tasks", "wm_choice", "--include_path", tasks, "--output_path", tmp_path / "out", "--log_samples"]
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "wm_runtimes.harness", *map(str, argv)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]["wm_choice"]
    expected = expected_choices()
    right = [int(np.argmin(nats)) == doc["answer"] for nats, doc in zip(expected, DOCS, strict=True)]
    assert scores["acc,none"] == pytest.approx(np.mean(right))
    lengths = [[len(choice) for choice in doc["choices"]] for doc in DOCS]
    right = [np.argmin(np.array(n) / k) == doc["answer"] for n, k, doc in zip(expected, lengths, DOCS, strict=True)]
    assert scores["acc_norm,none"] == pytest.approx(np.mean(right))


def test_the_adapter_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; import wm_runtimes.harness as h, lm_eval.api.registry as r; r.get_model(h.NAME)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
