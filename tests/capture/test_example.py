"""Inputs of any structure: what is taken, what a model is run on, and what an injection remembers of it."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.capture.example import Example, from_json, to_json
from se_inject.errors import ConfigError, SEInjectError, TraceError
from se_inject.surgery.state import injections_of

from ..support.checks import randomise
from ..support.dimensions import Unit


class Pair(nn.Module):
    """Two images, the second by keyword alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.unit, self.head = nn.Conv2d(3, 8, 3), Unit(), nn.Linear(8, 2)

    def forward(self, first, *, second, scale=None):
        y = self.unit(self.stem(first) + self.stem(second))
        y = self.head(y.mean((2, 3)))
        return y if scale is None else y * scale


class Listed(Pair):
    """Images one by one, as a detector takes them."""

    def forward(self, images):
        return [self.head(self.unit(self.stem(image[None])).mean((2, 3))) for image in images]


class Named(Pair):
    def forward(self, batch):
        return {"logits": self.head(self.unit(self.stem(batch["pixels"])).mean((2, 3)) + batch["ids"].sum())}


IMAGE = torch.rand(1, 3, 16, 16)
CASES = {
    "keywords": (Pair, {"first": IMAGE, "second": IMAGE, "scale": 2.0}), "list": (Listed, [IMAGE[0], IMAGE[0, :, :9]]),
    "list in a tuple": (Listed, ([IMAGE[0]],)), "dict in a tuple": (Named, ({"pixels": IMAGE, "ids": torch.tensor([[3, 4]])},)),
    "meta": (Pair, {"first": IMAGE.to("meta"), "second": torch.empty(1, 3, 16, 16, device="meta")})}


def called(model, inputs):
    inputs = Example.of(inputs)
    return (inputs.filled(torch.device("cpu")) if inputs.tensors[0].is_meta else inputs).run(model)


@pytest.mark.parametrize("case", CASES)
def test_models_of_any_inputs(case):
    cls, inputs = CASES[case]
    base = randomise(cls()).eval()
    if cls is not Listed:  # which takes a batch for a list
        with pytest.raises(TraceError, match="pass example_inputs="):
            se_inject.plan(base)
    made = se_inject.plan(base, example_inputs=inputs)
    assert [s.path for s in made.sites] == ["unit.se"] and made.ended is None
    model = se_inject.inject(copy.deepcopy(base), example_inputs=inputs, verify=True)
    with torch.no_grad():
        expected, found = called(base, inputs), called(model, inputs)
    assert all(map(torch.equal, torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found)))
    fast = se_inject.optimize_for_inference(randomise(model))  # it knows on what the model was injected
    assert {b.path for b in fast.se_report.blocks} == {"unit.se"}


def test_a_file_remembers_the_inputs(tmp_path):
    inputs = {"first": IMAGE, "second": IMAGE}
    model = randomise(se_inject.inject(Pair(), example_inputs=inputs)).eval()
    se_inject.save(model, tmp_path / "model.safetensors")
    loaded = se_inject.load(tmp_path / "model.safetensors", model=Pair()).eval()
    (there,), (here,) = ([i.written_inputs() for i in injections_of(m)] for m in (model, loaded))
    assert here == there == {"args": [], "kwargs": {
        "first": {"shape": [1, 3, 16, 16], "dtype": "float32"}, "second": {"shape": [1, 3, 16, 16], "dtype": "float32"}}}
    with torch.no_grad():
        assert torch.equal(called(loaded, inputs), called(model, inputs))


@pytest.mark.parametrize("inputs", [
    {"a": [1, (2.5, None, "x")], "b": torch.zeros(2, 3)}, (torch.zeros(1, dtype=torch.int64), {"c": [torch.ones(2)]})])
def test_json_and_back(inputs):
    made = Example.of(inputs)
    again = from_json(json.loads(json.dumps(to_json(made))))
    assert to_json(again) == to_json(made) and str(again) == str(made)


@pytest.mark.parametrize("inputs, message", [
    (3, "has no tensor"), ((), "has no tensor"), ({"x": object()}, "value of class object"), ("image.png", "has no tensor"),
    ({1: IMAGE}, "by their names")])  # fmt: skip
def test_other_inputs_are_said(inputs, message):
    for function in (se_inject.plan, se_inject.inject, se_inject.optimize_for_inference):
        with pytest.raises(ConfigError, match=message):
            function(timm.create_model("test_resnet"), example_inputs=inputs)


def test_one_of_size_and_inputs():
    with pytest.raises(ConfigError, match="give one of them"):
        se_inject.plan("test_resnet", input_size=(3, 64, 64), example_inputs=IMAGE)


def test_a_model_that_does_not_take_them_says_so():
    with pytest.raises(TraceError, match=r"Pair failed on inputs \(first=\(1, 3, 16, 16\), other=None\): TypeError"):
        se_inject.plan(Pair(), example_inputs={"first": IMAGE, "other": None})


def test_fold_takes_the_arguments_out_of_batches():
    inputs = {"first": IMAGE, "second": IMAGE}
    model = se_inject.inject(Pair(), example_inputs=inputs).eval()
    with pytest.raises(SEInjectError, match="it must give batches of such arguments"):
        se_inject.fold(model, [IMAGE])
    report = se_inject.fold(model, [{**inputs, "label": torch.zeros(1)}] * 2)
    assert report.images == 2 and len(report.folded) == 1 and report.change < 1e-6
    assert not se_inject.block_paths(model)


@pytest.mark.parametrize("said, size", [
    ({"config": {"image_size": 48, "num_channels": 1}}, (1, 48, 48)), ({"config": {"image_size": [32, 48]}}, (3, 32, 48)),
    ({"image_size": 40}, (3, 40, 40)), ({"config": {"vision_config": {"image_size": 24}}}, (3, 24, 24))])
def test_sizes_that_are_written_in_a_model(said, size):
    class Space:
        def __init__(self, values):
            self.__dict__.update({k: Space(v) if isinstance(v, dict) else v for k, v in values.items()})

    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    for name, value in said.items():
        setattr(model, name, Space(value) if isinstance(value, dict) else value)
    assert se_inject.input_sizes(model)[0] == size


def test_the_size_of_a_timm_model_inside():
    assert se_inject.input_sizes(nn.ModuleDict({"net": timm.create_model("test_resnet")})) == [(3, 160, 160)]
    assert se_inject.input_sizes(nn.Sequential(nn.Conv1d(4, 8, 3)))[0] == (4, 1024)
    assert se_inject.input_sizes(nn.Sequential(nn.Conv3d(2, 8, 3)))[0] == (2, 64, 64, 64)
