"""Profile the operators of an optimized model, without and with SE blocks: where does the time of the blocks go?

    python examples/profile_cost.py resnet50 --batch 1
    python examples/profile_cost.py resnet50 --engine onnxruntime

An engine runs the ONNX file of each model, and its own profiler counts its operators. A profiler itself takes time, most of all
for small operators. For the ratio of the two models use `se-inject bench`.
"""

import argparse
import copy
import json
import tempfile
from collections import Counter
from pathlib import Path

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import se_inject
from se_inject import block_paths, input_sizes
from se_inject.tables import markdown_table
from se_inject.tools.engines import onnxruntime_session, openvino_model
from se_inject.tools.variants import as_if_trained

RUNS, WARM_UP = 40, 5


def of_torch(model, images):
    """For each operator its self time in microseconds and its number of calls, in one run."""
    for _ in range(WARM_UP):
        model(images)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(RUNS):
            model(images)
    return {e.key: (e.self_cpu_time_total / RUNS, e.count // RUNS) for e in profiler.key_averages()}


def of_onnxruntime(model, images):
    """The same, by the kind of operator."""
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime_session(model, images, profile=f"{folder}/profile")
        for _ in range(WARM_UP + RUNS):
            session.run(None, {session.get_inputs()[0].name: images.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [(e["args"]["op_name"], e["dur"]) for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    return _per_run(nodes[len(nodes) // (WARM_UP + RUNS) * WARM_UP :])  # each run has the same number of events


def of_openvino(model, images):
    """The same, by the kind of operator and its kernel."""
    request, nodes = openvino_model(model, images, profile=True).create_infer_request(), []
    for i in range(WARM_UP + RUNS):
        request.infer(images.numpy())
        if i >= WARM_UP:
            nodes += [(f"{node.node_type} {node.exec_type}", node.real_time.microseconds) for node in request.profiling_info
                      if node.status == node.status.EXECUTED]
    return _per_run(nodes)


def _per_run(nodes):
    """The sums of a list of (operator, microseconds) of `RUNS` runs."""
    times, calls = Counter(), Counter(key for key, _ in nodes)
    for key, time in nodes:
        times[key] += time
    return {key: (times[key] / RUNS, calls[key] // RUNS) for key in times}


PROFILERS = {"torch": of_torch, "onnxruntime": of_onnxruntime, "openvino": of_openvino}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", choices=PROFILERS, default="torch")
    parser.add_argument("--rows", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = as_if_trained(timm.create_model(args.name).eval())
    injected = se_inject.inject(copy.deepcopy(base))
    as_if_trained(injected, block_paths(injected))
    models = [se_inject.optimize_for_inference(m).to(memory_format=torch.channels_last) for m in (base, injected)]
    images = torch.randn(args.batch, *input_sizes(base)[0]).contiguous(memory_format=torch.channels_last)
    without, with_blocks = (PROFILERS[args.engine](m, images) for m in models)
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
