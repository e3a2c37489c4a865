"""What planning, fusing and converting cost, in eager forwards of the model itself, side by side in one process.

Usage: python benchmarks/convert_cost.py [--model resnet50] [--batch 8] [--size 224] [--repeat 3]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import timm
import torch

import eagerq


def main() -> None:
    """Alternate one conversion with one forward, and print the median of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    model = timm.create_model(options.model).train()
    x = torch.randn(options.batch, 3, options.size, options.size)
    model(x)
    rows = []
    for _ in range(options.repeat):
        start = time.perf_counter()
        model(x)
        forward = time.perf_counter() - start
        start = time.perf_counter()
        fused = eagerq.fuse_modules(model)
        middle = time.perf_counter()
        eagerq.convert_qat(fused)
        end = time.perf_counter()
        rows.append((forward, middle - start, end - middle, (end - start) / forward))
    forward, fuse, convert, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{options.model}: train-mode forward of batch {options.batch} at {options.size} px {forward:.2f} s")
    print(f"plan and fuse {fuse:.2f} s, convert_qat {convert:.2f} s; together {ratio:.2f} forwards")


if __name__ == "__main__":
    main()
