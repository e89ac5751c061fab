"""Measure on a GPU what blocks cost, in the time given: eager, with CUDA graphs, and under inductor.

    python examples/gpu_cost.py --minutes 10 --out cost-gpu.md

For each part and network it runs one `se-inject bench`, prints its table, and adds it to the file of `--out`. Nothing begins
after `--minutes`, and what was left out is named at the end: so the last one may take longer, under inductor by minutes.
Without a GPU, `--device cpu` with small networks shows that the script runs.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path

from se_inject.errors import SEInjectError
from se_inject.tools import bench_tables
from se_inject.tools.bench import Settings, bench

NETWORKS = ["resnet50", "mobilenetv2_100", "convnext_tiny", "vit_small_patch16_224"]
PARTS = {  # how the models run; the cheap parts first
    "eager": ("inference", {}),
    "cudagraphs": ("inference", {"compile": True, "backend": "cudagraphs"}),
    "training": ("training", {}),
    "inductor": ("inference", {"compile": True}),
    "training-inductor": ("training", {"compile": True}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256], help="of inference")
    parser.add_argument("--training-batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16", help="training: of autocast")
    parser.add_argument("--minutes", type=float, default=10, help="nothing begins later")
    parser.add_argument("--min-time", type=float, default=0.5, metavar="SECONDS", help="for each model, on average")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("cost-gpu.md"))
    args = parser.parse_args()
    common = Settings(dtypes=(args.dtype,), device=args.device, channels_last=True, min_time=args.min_time)
    begin, text, left = time.monotonic(), [f"`{shlex.join(['python', 'examples/gpu_cost.py', *sys.argv[1:]])}`"], []
    for part in args.parts:
        measure, options = PARTS[part]
        batches = (args.training_batch,) if measure == "training" else tuple(args.batches)
        for network in args.networks:
            title = f"## {part}, {network}"
            minutes = (time.monotonic() - begin) / 60
            if minutes > args.minutes:
                left.append(title.removeprefix("## "))
                continue
            print(f"\n{title}, after {minutes:.1f} minutes\n")
            try:
                found = bench_tables.markdown(
                    bench([network], measure, settings=dataclasses.replace(common, batches=batches, **options)))
            except (SEInjectError, RuntimeError) as error:  # the others still count
                found = f"{type(error).__name__}: {error}"
            print(found, flush=True)
            text += [title, found]
            args.out.write_text("\n\n".join(text) + "\n")
    if left:
        text.append(f"No time was left for {'; '.join(left)}.")
        print(text[-1])
        args.out.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
