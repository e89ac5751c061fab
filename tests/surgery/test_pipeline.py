"""Plan, inject and eject: all or nothing, on models of any kind."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.errors import SEInjectError
from se_inject.surgery import pipeline as surgery
from se_inject.surgery.state import block_paths, injections_of
from se_inject.timm_names import skeleton

from ..support.checks import check_identity
from ..support.passes import Passes, nbytes
from ..support.residual import Network, Unit


def test_inject_passes_over_no_weights():
    model = timm.create_model("resnet50")
    before = nbytes(model)
    with Passes() as passes:
        se_inject.inject(model, stages=1)
    new = nbytes(model) - before
    assert new < before / 100
    assert passes.copied + passes.other < 20 * new


def test_planning_a_skeleton_needs_no_values():
    with Passes() as passes:
        se_inject.inject(skeleton("resnet18"))
    assert passes.copied + passes.other < 1 << 20


def test_a_plain_residual_network():
    check_identity(Network(Unit(), Unit()), (3, 16, 16))
    assert block_paths(se_inject.inject(Network(Unit(), Unit()))) == ["units.0.se", "units.1.se"]


class Named(Unit):
    def forward(self, x):
        y = torch.add(input=x, other=self.b(self.a(x)))
        return torch.cat(tensors=[y, x], dim=1)[:, :16]


def test_arguments_by_name():
    check_identity(Network(Named()), (3, 16, 16))


@pytest.mark.parametrize("name, placement", [("resnet18", "standard"), ("vovnet39a", "post"), ("nf_resnet26", "inner")])
def test_planning_an_injected_model_changes_nothing(name, placement):
    model = se_inject.inject(timm.create_model(name).eval(), placement=placement)
    classes, x = [type(m) for m in model.modules()], torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        plan = se_inject.plan(model, placement=placement)
        assert not plan.sites and [type(m) for m in model.modules()] == classes
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("size", [224, "a", (3, 32.0, 32), (3, -1, 2), (3,)])
def test_a_wrong_input_size_is_said(size):
    with pytest.raises(se_inject.SEInjectError, match="expected \\(C, H, W\\)"):
        se_inject.plan(Network(Unit()), input_size=size)


def test_what_is_no_model_and_what_has_no_weights_yet():
    with pytest.raises(se_inject.SEInjectError, match="needs a model"):
        se_inject.eject("resnet18")
    with pytest.raises(se_inject.SEInjectError, match="lazy layers"):
        se_inject.inject(nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU()))


def snapshot(model):
    return ([(n, type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()],
            {k: (t.data_ptr(), t._version) for k, t in model.state_dict().items()})


@pytest.mark.parametrize("name, options, message", [
    ("seresnet18", {}, "already have channel attention"),
    ("resnet18", {"include": "nothing*"}, "no include pattern matches"),
    ("resnet18", {"input_size": (5, 64, 64)}, "input_size"),
    ("resnet18", {"act_layer": "nonsense"}, "nonsense"),
    ("vit_tiny_patch16_224", {"input_size": (3, 100, 100)}, "input_size"),
    ("vit_tiny_patch16_224", {"placement": "inner"}, "one convolution over space"),
])  # fmt: skip
def test_a_refused_model_is_as_it_was(name, options, message):
    model = timm.create_model(name)
    model.layer1.eval() if hasattr(model, "layer1") else model.blocks[0].eval()
    before = snapshot(model)
    with pytest.raises(SEInjectError, match=message):
        se_inject.inject(model, **options)
    assert snapshot(model) == before


def test_a_failure_in_the_middle_undoes_everything(monkeypatch):
    model = timm.create_model("resnet18")
    before = snapshot(model)
    real, calls = surgery.apply_edits, []

    def fail_at_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("third")
        real(*args)

    monkeypatch.setattr(surgery, "apply_edits", fail_at_third)
    with pytest.raises(MemoryError, match="third"):
        se_inject.inject(model)
    assert snapshot(model) == before


def test_plan_changes_nothing():
    model = timm.create_model("convnext_atto")
    before = snapshot(model)
    se_inject.plan(model)
    assert snapshot(model) == before


def test_flags_device_and_dtype_follow():
    model = timm.create_model("resnet18").to(torch.bfloat16)
    model.layer1.eval()
    se_inject.inject(model)
    assert not model.layer1[0].se.training and model.layer2[0].se.training and model.layer2.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        skeleton = timm.create_model("resnet18")
    assert se_inject.inject(skeleton).layer1[0].se.fc1.weight.is_meta


@pytest.mark.parametrize("outside", [False, True])
def test_inference_mode(outside):
    """Weights that were made in it, and surgery in it or not: the blocks are made so that they can be trained."""
    with torch.inference_mode():
        model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    with torch.inference_mode(not outside):
        assert se_inject.plan(model).sites
        se_inject.inject(model)
        fast = se_inject.optimize_for_inference(model, input_size=(3, 64, 64))
    assert not any(p.is_inference() for p in se_inject.se_parameters(model))
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.allclose(fast(x), expected, rtol=1e-4, atol=1e-5)


def test_a_second_inject_finds_every_site_taken():
    model = se_inject.inject(timm.create_model("convnext_atto"))
    with pytest.raises(se_inject.NoSitesError, match="already have channel attention"):
        se_inject.inject(model)


def test_two_injections_of_different_stages_eject_together():
    model = timm.create_model("resnet18")
    keys = list(model.state_dict())
    se_inject.inject(model, stages=1, ratio=0.5)
    se_inject.inject(model, stages=2)
    se_inject.eject(model)
    assert list(model.state_dict()) == keys and not injections_of(model)


def test_eject_without_blocks_says_so():
    with pytest.raises(SEInjectError, match="no injected blocks"):
        se_inject.eject(timm.create_model("resnet18"))


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        se_inject.eject(se_inject.inject(timm.create_model("resnet18")))
