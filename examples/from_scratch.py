"""Train small networks from scratch, with and without blocks, and compare test errors, curves, and steps to the same error.

    pip install 'se-inject[examples]'
    python examples/from_scratch.py --data FOLDER --jobs 2 --out docs/worth.md

FOLDER has the files of Fashion-MNIST, as Debian's package dataset-fashion-mnist or torchvision writes them. Runs of one seed
share the weights of the base, the batches and their augmentation. All runs of a network have the same learning rate. With
`--equal-time` each variant is also trained for fewer steps, so that it takes the time of the base. A killed command that is
given again runs what is missing in `--results`.
"""

import argparse
import functools
import itertools
import math
import shlex
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn

import se_inject
from study import Results, around, difference, digest, machine, panels, pictures, put_between, run_jobs

NETWORKS = {  # of a width, with `depth` times the blocks
    "resnet": lambda width, depth: ResNet(
        BasicBlock, (depth,) * 4, 10, in_chans=1, stem_width=width, channels=(width, 2 * width, 4 * width, 8 * width)),
    "mobilenetv2": lambda width, depth: EfficientNet(
        decode_arch_def([[f"ds_r1_k3_s1_c{width // 2}"], [f"ir_r{depth}_k3_s2_e4_c{width}"],
                         [f"ir_r{2 * depth}_k3_s2_e4_c{2 * width}"], [f"ir_r{depth}_k3_s1_e4_c{3 * width}"]]),
        num_classes=10, num_features=8 * width, in_chans=1, stem_size=width, fix_stem=True),
    "convnext": lambda width, depth: ConvNeXt(
        in_chans=1, num_classes=10, patch_size=3, depths=(depth,) * 4, dims=(width, 2 * width, 4 * width, 8 * width)),
}
VARIANTS = {
    "base": None,
    "SE 1/16": {"ratio": 1 / 16},
    "SE 1/4": {"ratio": 1 / 4},
    "SE 1/16, timm's start": {"ratio": 1 / 16, "init": "timm"},
    "SE 1/4, timm's start": {"ratio": 1 / 4, "init": "timm"},
    "ECA": {"block": "eca"},
    "FiLM 1/4": {"block": "film", "ratio": 1 / 4},
}
SETTINGS = ("data", "network", "width", "depth", "variant", "seed", "images", "test", "batch_size", "steps", "lr")
SIDE, MEAN, STD = 28, (0.5,), (0.25,)
WEIGHT_DECAY, LABEL_SMOOTHING, POINTS = 0.05, 0.1, 12  # points of a curve


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST, or of files in its format")
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--depth", type=int, default=1, help="blocks of a stage")
    parser.add_argument("--images", type=int, default=60000, help="to train on")
    parser.add_argument("--test", type=int, default=10000, help="images to test on")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--equal-time", action="store_true", help="train each variant for the time of the base, too")
    parser.add_argument("--results", type=Path, default=Path("from-scratch.csv"), help="CSV file of the results")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread")
    parser.add_argument("--out", type=Path, help="page; what stands between <!-- PART: begin --> and end is replaced")
    parser.add_argument("--part", default="from scratch", help="of the page [%(default)s]")
    parser.add_argument("--plot", type=Path, help="picture of the learning curves to write (.svg or .png)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: give each seed once")
    if args.equal_time and "base" not in args.variants:
        parser.error("--equal-time needs the variant base")
    return args


@functools.cache
def load(folder, images, test):
    """Training images and labels, and the tensors to test on."""
    (train, labels), held_out = pictures(folder)
    if held_out is None:
        sys.exit(f"--data {folder}: the files of Fashion-MNIST are not there (train-images-idx3-ubyte and three others)")
    if images > len(labels) or test > len(held_out[1]):
        sys.exit(f"--images {images} --test {test}: {folder} has {len(labels)} and {len(held_out[1])} images")
    transform = create_transform((1, SIDE, SIDE), mean=MEAN, std=STD, crop_pct=1.0)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in held_out[0][:test]])
    return train[:images], torch.from_numpy(labels[:images]), pixels, torch.from_numpy(held_out[1][:test])


@functools.lru_cache(maxsize=1)
def drawn(folder, images, test, seed, size):
    """Batches of a seed, with timm's augmentation, that depend on the seed and the step alone: (those so far, the rest)."""
    pixels, labels, *_ = load(folder, images, test)
    return [], _draw(pixels, labels, seed, size)


def _draw(images, labels, seed, size):
    transform = create_transform((1, SIDE, SIDE), is_training=True, use_prefetcher=True, scale=(0.8, 1.0), ratio=(0.9, 1.1),
                                 color_jitter=None)  # to 8-bit arrays
    step = 0
    for epoch in itertools.count():  # a last part of a batch is left out
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            random_seed(zlib.crc32(f"{seed} {step}".encode()))
            chosen = order[start : start + size]
            yield torch.from_numpy(np.stack([transform(Image.fromarray(images[i])) for i in chosen])), labels[chosen]
            step += 1


def batches(args, setting):
    """The batches of a run: those of its seed, which runs that follow each other in one process share."""
    known, rest = drawn(args.data, setting["images"], args.test, setting["seed"], setting["batch_size"])
    for step in range(setting["steps"]):
        if step == len(known):
            known.append(next(rest))
        pixels, labels = known[step]
        yield (pixels / 255 - MEAN[0]) / STD[0], labels


def build(network, width, depth, variant, seed):
    """The network of a seed with the blocks of a variant. The base's weights depend on the seed alone."""
    random_seed(seed)
    model = NETWORKS[network](width, depth)
    options = VARIANTS[variant]
    if options is not None:
        model.eval()
        se_inject.inject(model, input_size=(1, SIDE, SIDE), **options)
    return model.train()


@torch.inference_mode()
def test_error(model, pixels, labels):
    model.eval()
    wrong = sum((model(x).argmax(1) != y).sum().item() for x, y in zip(pixels.split(500), labels.split(500)))
    model.train()
    return 100 * wrong / len(labels)


def run(args, setting, advance):
    """Train once; the row has the test error, its curve, and the median processor time of a step."""
    *_, pixels, truth = load(args.data, setting["images"], args.test)
    seed, steps = setting["seed"], setting["steps"]
    model = build(setting["network"], setting["width"], setting["depth"], setting["variant"], seed)
    model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, "adamw", lr=setting["lr"], weight_decay=WEIGHT_DECAY)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=steps, warmup_epochs=steps // 20, step_on_epochs=False, updates_per_epoch=1)
    random_seed(seed)
    seconds, curve, losses = [], [], []
    for step, (x, y) in enumerate(batches(args, setting)):
        scheduler.step_update(step)
        since = time.process_time()
        loss = nn.functional.cross_entropy(model(x), y, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - since)
        losses.append(loss.item())
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            curve.append(test_error(model, pixels, truth))
        advance(1)
    curve = [round(error, 4) for error in curve]
    return {"error": curve[-1], "train_loss": round(statistics.mean(losses[-math.ceil(steps / POINTS) :]), 5),
            "numbers": sum(p.numel() for p in model.parameters()), "seconds": round(statistics.median(seconds), 5),
            "machine": machine(), "curve": " ".join(map(str, curve))}


def study(args, results, network, seconds=None):
    """The rows of a network's variants: {variant: rows}; with `seconds` of a step, for the time of the base."""
    steps = round(args.epochs * args.images / args.batch_size)
    data = digest(args.data.name, load(args.data, args.images, args.test)[1])
    own = {v: steps if seconds is None else round(steps * seconds["base"] / seconds[v]) for v in args.variants}
    settings = [
        {"data": data, "network": network, "width": args.width, "depth": args.depth, "variant": variant, "seed": seed,
         "images": args.images, "test": args.test, "batch_size": args.batch_size, "steps": own[variant], "lr": args.lr}
        for seed in args.seeds for variant in args.variants]
    visible = sys.stderr.isatty() and not args.quiet
    rows = run_jobs(results, settings, functools.partial(run, args), args.jobs, visible, steps)
    return {variant: [row for row in rows if row["variant"] == variant] for variant in args.variants}


def fewer_steps(rows, base):
    """Steps until a variant's error is at most the final one of the base, over the base's steps; None if it never is."""
    parts = []
    for row, reference in zip(rows, base, strict=True):
        curve = [float(error) for error in str(row["curve"]).split()]
        points = [i + 1 for i, error in enumerate(curve) if error <= reference["error"]]
        if not points:
            return None
        parts.append(points[0] / len(curve) * row["steps"] / reference["steps"])
    return statistics.mean(parts)


def table(args, network, found, timed):
    steps = found["base"][0]["steps"] if "base" in found else next(iter(found.values()))[0]["steps"]
    lines = [
        f"### {network}", "",
        f"{args.images} images of {SIDE} x {SIDE}, {args.epochs:g} epochs ({steps} steps of {args.batch_size}); AdamW at "
        f"{args.lr:g}, weight decay {WEIGHT_DECAY}, cosine schedule, label smoothing {LABEL_SMOOTHING}; width {args.width}, "
        f"{args.depth} block(s) of a stage. Errors on {args.test} test images: mean ± standard deviation over seeds "
        f"{', '.join(map(str, args.seeds))}; differences to the base are paired by seed, with their 95 % interval, bold where "
        f"it excludes zero. Steps: until the base's final error is reached, in percent of the base's steps, by a curve of "
        f"{POINTS} points. Step time: processor time over the base's. "
        f"{'; '.join(sorted({r['machine'] for rows in found.values() for r in rows}))}.", "",
        "| variant | numbers | test error, % | minus base | training loss | steps, % | step time |"
        + (" minus base at equal time |" if timed else ""),
        "|---" * (8 if timed else 7) + "|"]
    base = found.get("base")
    seconds = {variant: statistics.median(r["seconds"] for r in rows) for variant, rows in found.items()}
    for variant, rows in found.items():
        errors = [r["error"] for r in rows]
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        compared = reached = ratio = ""
        if base is not None and variant != "base":
            compared = difference(errors, [r["error"] for r in base])
            part = fewer_steps(rows, base)
            reached = "not in all runs" if part is None else f"{100 * part:.0f}"
        if base is not None:
            ratio = f"{seconds[variant] / seconds['base']:.2f}"
        line = (f"| {variant} | {rows[0]['numbers']:,} | {statistics.mean(errors):.2f}{spread} | {compared} | "
                f"{statistics.mean(r['train_loss'] for r in rows):.4f} | {reached} | {ratio} |")
        if timed:
            at_time = "" if variant == "base" else difference(
                [r["error"] for r in timed[variant]], [r["error"] for r in timed["base"]])
            line += f" {at_time} |"
        lines.append(line)
    return "\n".join(lines)


def plot(path, everything):
    """The learning curves: one panel for each network, the mean over seeds of each variant."""
    with panels(path, list(everything), 5) as axes:
        for network, found in everything.items():
            for variant, rows in found.items():
                curves = np.array([[float(e) for e in str(r["curve"]).split()] for r in rows])
                steps = rows[0]["steps"] * np.arange(1, curves.shape[1] + 1) / curves.shape[1]
                is_base = variant == "base"
                axes[network].plot(steps, curves.mean(0), label=variant, color="black" if is_base else None,
                                   linewidth=2 if is_base else 1.2)
            axes[network].set(xlabel="steps", ylabel="test error, %", yscale="log")
            axes[network].yaxis.set_major_formatter("{x:g}")
            axes[network].yaxis.set_minor_formatter("{x:g}")
        axes[network].legend(fontsize=8)


def main(argv=None):
    args = parse(argv)
    if args.out:
        around(args.out, args.part)  # now, and not after hours of training
    results, everything, parts = Results(args.results, SETTINGS), {}, []
    for network in args.networks:
        found = everything[network] = study(args, results, network)
        seconds = {variant: statistics.median(r["seconds"] for r in rows) for variant, rows in found.items()}
        timed = study(args, results, network, seconds) if args.equal_time else None
        parts.append(table(args, network, found, timed))
    command = f"`{shlex.join(['python', 'examples/from_scratch.py', *(sys.argv[1:] if argv is None else argv)])}`"
    shown = "\n\n".join([command, *parts])
    print(shown)
    if args.plot:
        plot(args.plot, everything)
    if args.out:
        put_between(args.out, args.part, shown)


if __name__ == "__main__":
    main()
