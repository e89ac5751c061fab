"""Where the time of SE goes for inference: operators of an optimised model, without and with blocks.

    python examples/profile_cost.py resnet50 --batch 1

The profiler costs time of its own, and most for small operators: ratios are `se-inject bench`'s.
"""

import argparse
import copy

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import se_inject
from se_inject import block_paths, input_sizes
from se_inject.tools.variants import lived_in

RUNS = 40


def operators(model, images):
    """Self time in microseconds and calls of each operator, for one run."""
    for _ in range(5):
        model(images)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(RUNS):
            model(images)
    return {e.key: (e.self_cpu_time_total / RUNS, e.count // RUNS) for e in profiler.key_averages()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = lived_in(timm.create_model(args.name).eval())
    injected = lived_in(se_inject.inject(copy.deepcopy(base)), block_paths)
    models = [se_inject.optimize_for_inference(m).to(memory_format=torch.channels_last) for m in (base, injected)]
    images = torch.randn(args.batch, *input_sizes(base)[0]).contiguous(memory_format=torch.channels_last)
    without, with_blocks = (operators(m, images) for m in models)
    print("| operator | calls | us | calls, with blocks | us, with blocks | difference, us |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    none = (0.0, 0)
    keys = sorted(without.keys() | with_blocks.keys(), key=lambda k: -abs(
        with_blocks.get(k, none)[0] - without.get(k, none)[0]))
    for key in keys[:args.rows]:
        (a, n), (b, m) = without.get(key, none), with_blocks.get(key, none)
        print(f"| {key} | {n} | {a:,.0f} | {m} | {b:,.0f} | {b - a:+,.0f} |")
    a, b = (sum(t for t, _ in d.values()) for d in (without, with_blocks))
    print(f"| all | | {a:,.0f} | | {b:,.0f} | {b - a:+,.0f} ({b / a - 1:+.1%}) |")


if __name__ == "__main__":
    main()
