"""How fast this machine reads memory: threads go over one big float32 array; prints {"read_gb_s": best, in 1e9 bytes a second}."""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the array, several times any cache")
    parser.add_argument("--tries", type=int, default=8)
    options = parser.parse_args()
    import numpy as np

    parts = np.array_split(np.ones(options.megabytes * 1_000_000 // 4, np.float32), options.threads)
    size = sum(part.nbytes for part in parts)
    with ThreadPoolExecutor(options.threads) as pool:
        times = [time_read(pool, reduce, parts) for _ in range(options.tries) for reduce in (np.max, np.sum)]
    print(json.dumps({"read_gb_s": size / min(times) / 1e9}))


def time_read(pool, reduce, parts):
    start = time.perf_counter()
    list(pool.map(reduce, parts))
    return time.perf_counter() - start


main()
