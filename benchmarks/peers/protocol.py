"""What every runner shares: its command line, its timings and its one line of JSON. Standard library only, so every environment can use it.

A runner is a class with `__init__(options)`, `prefill(ids) -> token` and `step(token) -> token`; for `cold` also `text(prompt) -> str`, for
`check` also `logits`, the row that the last token was chosen from. `prefill` starts from an empty state; tokens are greedy and the
end-of-sequence token does not stop them.
"""

import argparse
import json
import resource
import sys
import time


def run(make):
    """Do what the command line asks for with the runner that `make(options)` builds."""
    options = _options()
    runner = make(options)
    if options.mode == "cold":
        print(runner.text(options.prompt), flush=True)
    elif options.mode == "check":
        print(json.dumps(check(runner, options.reference)))
    else:
        print(json.dumps({**speed(runner, options.ids, options.steps), **memory()}))


def _options():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("speed", "cold", "check"))
    parser.add_argument("model")
    parser.add_argument("--ids", help="file with a JSON list of token ids, the prompt of `speed`")
    parser.add_argument("--prompt", default="The capital of France is", help="the prompt of `cold`")
    parser.add_argument("--reference", help="file with the prompt, tokens and logits of `check`")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--runtime", default="onnxruntime-cpu", help="of run_wm.py")
    return parser.parse_args()


def speed(runner, ids_file, steps, prefills=3, warm_steps=4):
    """Tokens per second of prefill and of decoding, after one warm-up of each."""
    with open(ids_file, encoding="utf-8") as file:
        ids = json.load(file)
    generate(runner, runner.prefill(ids), warm_steps)
    times = []
    for _ in range(prefills):
        start = time.perf_counter()
        token = runner.prefill(ids)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    tokens = generate(runner, token, steps)
    decode = time.perf_counter() - start
    return {"prefill_tok_s": len(ids) / sorted(times)[prefills // 2], "decode_tok_s": steps / decode, "tokens": [token, *tokens]}


def check(runner, reference_file):
    """The largest difference of any logit from the reference's, over the rows after the prompt and after each token fed behind it."""
    with open(reference_file, encoding="utf-8") as file:
        reference = json.load(file)
    runner.prefill(reference["ids"])
    found = [runner.logits.tolist()]
    for token in reference["tokens"]:
        runner.step(token)
        found.append(runner.logits.tolist())
    pairs = [pair for rows in zip(found, reference["logits"], strict=True) for pair in zip(*rows, strict=True)]
    differences = [abs(one - other) for one, other in pairs]
    worst = max(differences) if all(difference == difference for difference in differences) else float("inf")  # NaN is none
    return {"logit_difference": worst, "largest_logit": max(abs(other) for _, other in pairs)}


def generate(runner, token, steps):
    """The next `steps` tokens."""
    tokens = []
    for _ in range(steps):
        token = runner.step(token)
        tokens.append(token)
    return tokens


def memory():
    """Peak resident memory of this process in MB (1e6 bytes), and where readable how much of today's is private and how much file pages."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return found
    for name, field in {"rss_mb": "VmHWM", "rss_anon_mb": "RssAnon", "rss_file_mb": "RssFile"}.items():
        if field in fields:
            found[name] = int(fields[field].split()[0]) * 1024 / 1e6
    return found
