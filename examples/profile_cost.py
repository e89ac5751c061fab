"""Profile the operators of an optimized model, without and with SE blocks: where does the time of the blocks go?

    python examples/profile_cost.py resnet50 --batch 1

The profiler itself takes time, most of all for small operators. For the ratio of the two models use `se-inject bench`.
"""

import argparse
import copy

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import se_inject
from se_inject import block_paths, input_sizes
from se_inject.tables import markdown_table
from se_inject.tools.variants import as_if_trained

RUNS = 40


def operators(model, images):
    """For each operator its self time in microseconds and its number of calls, in one run."""
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
    base = as_if_trained(timm.create_model(args.name).eval())
    injected = se_inject.inject(copy.deepcopy(base))
    as_if_trained(injected, block_paths(injected))
    models = [se_inject.optimize_for_inference(m).to(memory_format=torch.channels_last) for m in (base, injected)]
    images = torch.randn(args.batch, *input_sizes(base)[0]).contiguous(memory_format=torch.channels_last)
    without, with_blocks = (operators(m, images) for m in models)
    lines = []
    for key in without.keys() | with_blocks.keys():
        (a, n), (b, m) = without.get(key, (0.0, 0)), with_blocks.get(key, (0.0, 0))
        lines.append((abs(b - a), (key, str(n), f"{a:,.0f}", str(m), f"{b:,.0f}", f"{b - a:+,.0f}")))
    rows = [row for _, row in sorted(lines, reverse=True)[:args.rows]]
    a, b = (sum(t for t, _ in d.values()) for d in (without, with_blocks))
    rows.append(("all", "", f"{a:,.0f}", "", f"{b:,.0f}", f"{b - a:+,.0f} ({b / a - 1:+.1%})"))
    header = ("operator", "calls", "us", "calls, with blocks", "us, with blocks", "difference, us")
    print(markdown_table(header, rows, left=("operator",)))


if __name__ == "__main__":
    main()
