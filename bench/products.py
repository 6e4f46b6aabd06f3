"""Which dtype this processor multiplies faster: GFLOP/s of one matrix product, and what `--dtype auto` takes.

python bench/products.py [--size 2048] [--rounds 10]
"""

import argparse
import time

import torch

from plainsd.device import choose_dtype
from plainsd.reports.bench import processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; the best of {asked.rounds}")
    for dtype in (torch.float32, torch.bfloat16):
        a, seconds = torch.randn(asked.size, asked.size).to(dtype), []
        for _ in range(asked.rounds + 1):  # the first lays out and does not count
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
        print(f"{dtype}: {2 * asked.size**3 / min(seconds[1:]) / 1e9:.0f} GFLOP/s")
    print(f"auto: {choose_dtype('auto', torch.device('cpu'))}")


if __name__ == "__main__":
    main()
