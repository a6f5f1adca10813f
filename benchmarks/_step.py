"""Open one session, feed a prompt and time single steps: prints {"open_s", "step_ms", "rss_mb"}."""

import argparse
import json
import resource
import time


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first timed step")
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    from wm_runtimes import open_session

    start = time.perf_counter()
    session = open_session(options.bundle, runtime="onnxruntime-cpu", capacity=options.capacity, threads=options.threads)
    opened = time.perf_counter() - start
    session.prefill([[token % 200 + 10 for token in range(options.prompt)]])
    times = [time_step(session) for _ in range(options.steps + 4)][4:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"open_s": opened, "step_ms": sorted(times)[len(times) // 2] * 1e3, "rss_mb": peak * 1024 / 1e6}))


def time_step(session):
    start = time.perf_counter()
    session.decode([42])
    return time.perf_counter() - start


main()
