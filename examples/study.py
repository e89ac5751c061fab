"""What the two studies share: results that a killed study finds again, pictures, paired differences, and jobs."""

import contextlib
import csv
import gzip
import math
import os
import statistics
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.stats import t as student
from torchvision.datasets import ImageFolder

IDX = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


class Results:
    """A CSV file of results, one row for each run; a run that has a row is not run again."""

    def __init__(self, path, settings, writes=True):
        self.path, self.settings = path, settings  # the columns that tell one run from another
        self.writes = writes  # one of several processes that share a run
        self.rows = {}
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]  # a kill may have cut the last row
            reader = csv.DictReader(whole.splitlines())
            if missing := set(settings) - set(reader.fieldnames or ()):
                raise SystemExit(f"--results {path}: it has no column {', '.join(sorted(missing))}; give another file")
            for row in reader:
                self.rows[self._key(row)] = {key: _number(value) for key, value in row.items()}

    def _key(self, row):
        return tuple(str(_number(str(row[name]))) for name in self.settings)

    def get(self, **setting):
        return self.rows.get(self._key(setting))

    def add(self, row):
        """Keep a row and append it to the file, as one write, so that several processes may."""
        self.rows[self._key(row)] = row
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", newline="") as file:
            file.seek(0)
            text = file.read()
            columns = text.splitlines()[0].split(",") if text else list(row)
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if not text:
                writer.writeheader()
            elif not text.endswith("\n"):
                file.truncate(len((text.rpartition("\n")[0] + "\n").encode()))
            writer.writerow(row)


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_jobs(results, settings, function, jobs, visible, total=1, after=None):
    """The rows of all settings, in their order; those that are missing are run, `jobs` processes at a time.

    Args:
        results: The `Results`; each row is added as soon as its run ends.
        settings: A dict of the columns that tell one run from another, for each run.
        function: Called with a setting and a function to call with the parts of `total` that are done; returns a row.
        jobs: Processes of one thread each; 1 is this process, with its own threads.
        visible: Whether to show a progress bar.
        total: The parts of a run.
        after: Called with the setting of a run whose row is written.
    """
    missing = [s for s in settings if results.get(**s) is None]
    with Progress(console=Console(stderr=True), disable=not visible) as progress:
        task = progress.add_task("", total=total * len(settings), completed=total * (len(settings) - len(missing)))
        if jobs == 1:
            for setting in missing:
                progress.update(task, description=" ".join(str(v) for v in setting.values()))
                _finish(results, setting, function(setting, lambda n: progress.advance(task, n)), after)
        else:
            with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                running = {pool.submit(function, setting, _nothing): setting for setting in missing}
                for done in as_completed(running):
                    if done.exception() is None:
                        _finish(results, running[done], done.result(), after)
                    progress.advance(task, total)
                for done in running:
                    done.result()  # raises, now that the rows of the others are kept
    return [results.get(**s) for s in settings]


def _finish(results, setting, row, after):
    results.add({**setting, **row})
    if after is not None:
        after(setting)


def _nothing(_):
    pass


def paired(a, b):
    """Mean of the differences `a` - `b` of runs with the same seeds, and half the width of its 95 % interval."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return differences[0], math.inf
    half = student.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), half


def difference(a, b):
    """The paired difference as text, bold where its interval excludes zero."""
    mean, half = paired(a, b)
    text = f"{mean:+.2f} ± {half:.2f}" if math.isfinite(half) else f"{mean:+.2f}"
    return f"**{text}**" if abs(mean) > half else text


def pictures(folder):
    """((images, labels) to train on, (images, labels) to test on) of a folder; the second is None for an `ImageFolder`.

    `folder` has four files in the format of MNIST anywhere in it, as Debian's package dataset-fashion-mnist and torchvision's
    ``FashionMNIST(download=True)`` write them, or a folder of pictures for each class. Images are arrays, or paths.
    """
    folder = Path(folder)
    found = {part: sorted(folder.rglob(f"{name}*")) for part, name in IDX.items()}
    if any(len(files) > 1 for files in found.values()):
        raise SystemExit(f"--data {folder}: it has the files of several sets of pictures; give the folder of one")
    if all(found.values()):
        return tuple(_idx(found[part][0]) for part in IDX)
    samples = ImageFolder(folder).samples
    images = np.empty(len(samples), dtype=object)
    images[:] = [path for path, _ in samples]
    return (images, np.array([label for _, label in samples])), None


def _idx(path):
    labels = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    images, labels = (np.frombuffer(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes(), np.uint8)
                      for p in (path, labels))
    return images[16:].reshape(len(labels) - 8, 28, 28), labels[8:].astype(np.int64)


def write(path, writer):
    """Call `writer` with a path beside `path`, then rename: a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    writer(beside)
    os.replace(beside, path)


def around(page, name):
    """What stands before and behind the part of a page between two comments of that name, with the comments.

    Raises:
        SystemExit: The page has not one of each.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(
            f"--out {page}: the page has not one {begin} and one {end}; add these two lines where the text belongs")
    return old.split(begin)[0] + begin, end + old.split(end)[1]


def put_between(page, name, text):
    """Replace the part of a page between two comments of that name."""
    before, after = around(page, name)
    write(page, lambda path: path.write_text(f"{before}\n\n{text}\n\n{after}"))


@contextlib.contextmanager
def panels(path, titles, width):
    """Panels side by side to draw on, {title: axis}, that are written to a file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=(width * len(titles), 4.5), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    yield dict(zip(titles, axes[0]))
    write(path, lambda beside: figure.savefig(beside, format=path.suffix[1:]))
    plt.close(figure)


def digest(name, labels):
    """A name for a set of pictures, the same wherever its folder is."""
    return f"{name}-{zlib.crc32(np.asarray(labels, np.int64).tobytes()):08x}"


def machine(device="cpu"):
    """The machine of a run, in words."""
    return f"{device}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"
