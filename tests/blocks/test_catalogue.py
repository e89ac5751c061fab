"""The rows of the catalogue: each block at the same sites, an identity at the start, or refused with the reason."""

import copy
import dataclasses

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import se_inject
from se_inject import block_paths
from se_inject.blocks import catalogue
from se_inject.blocks.build import BlockSpec, make_block
from se_inject.blocks.catalogue import Block, block_names, get_block
from se_inject.blocks.film import ScaleAndShift
from se_inject.blocks.identity import Start, is_identity, make_identity
from se_inject.config import SEConfig

from ..support.checks import check_identity, randomise

NO_IDENTITY = {"lcbam"}  # its channel gate is a mean of two squeezes' gates, its spatial one a sum of two maps
SHORT = {"depths": (1, 1, 1, 1)}
GATES = [n for n in block_names() if n not in NO_IDENTITY]


@pytest.mark.parametrize("block", GATES)
def test_identity_on_maps(block):
    check_identity(timm.create_model("test_resnet"), (3, 64, 64), block=block)


@pytest.mark.parametrize("block", [b for b in GATES if not get_block(b).positions])
@pytest.mark.parametrize("name, args", [("test_vit", {"img_size": 64}), ("mambaout_femto", SHORT)])  # tokens; and NHWC
def test_identity_in_other_layouts(name, args, block):
    check_identity(timm.create_model(name, **args), (3, 64, 64), block=block)


@pytest.mark.parametrize("block", sorted(NO_IDENTITY))
def test_what_is_no_identity_is_refused_with_the_reason(block):
    model = timm.create_model("resnet18")
    with pytest.raises(se_inject.SEInjectError, match=r"does not return its input at the start; use init='timm'"):
        se_inject.inject(model, block=block)
    assert not block_paths(model)
    assert len(block_paths(se_inject.inject(model, block=block, init="timm"))) == 8


@pytest.mark.parametrize("block, message", [
    ("sk", "replaces a convolution by several"), ("nl", "does not gate it"), ("halo", "self-attention"),
    ("sse", "did you mean"), ("nothing", "the blocks are se, film, ese")])  # fmt: skip
def test_what_is_no_gate_is_refused_with_the_reason(block, message):
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.plan("resnet18", block=block)


def test_an_option_that_a_block_lacks_is_named():
    with pytest.raises(se_inject.SEInjectError, match=r"block='eca' has no option 'bias'"):
        se_inject.plan("resnet18", block="eca", bias=False)


@pytest.mark.parametrize("block", ["se", "film", "ese", "ge"])
def test_a_gate_that_cannot_be_one_is_refused_for_every_block(block):
    with pytest.raises(se_inject.SEInjectError, match=r"Tanh, is 0 with slope 1 at 0.*use gate_layer='sigmoid'"):
        se_inject.plan("resnet18", block=block, gate_layer="tanh")


@pytest.mark.parametrize("option", ["act_layer", "gate_layer"])
def test_a_name_that_timm_does_not_know(option):
    with pytest.raises(se_inject.SEInjectError, match=r"names of timm\.layers.create_act"):
        se_inject.plan("resnet18", **{option: "none_such"})
    with pytest.raises(se_inject.SEInjectError, match=f"{option}=''"):
        se_inject.plan("resnet18", **{option: ""})


@pytest.mark.parametrize("block", [*GATES, "efficientnet"])
def test_a_trained_block_goes_back_to_its_start(block):
    name, style = ("se", block) if block == "efficientnet" else (block, block)
    config = SEConfig(block=name)
    module = make_block(BlockSpec(16, 8, "NCHW", style), config, None, 1.0, "cpu", torch.float32)
    x = torch.randn(2, 16, 8, 8)
    for _ in range(2):
        assert is_identity(module) and torch.equal(module(x), x)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_()
        assert not is_identity(module) and not torch.equal(module(x), x)
        make_identity(get_block(name).styled(style).start, module)


def test_a_map_of_tokens_has_no_rows_and_columns():
    plan = se_inject.plan("test_vit", block="cbam")
    assert not plan.sites
    assert {s.reason for s in plan.skipped} == {
        "block='cbam' needs a map with height and width, and this is a sequence of tokens"}


@pytest.mark.parametrize("block", GATES)
def test_the_plan_counts_what_is_added(block):
    model = timm.create_model("test_resnet")
    plan = se_inject.plan(model, block=block)
    assert [s.path for s in plan.sites] == [s.path for s in se_inject.plan("test_resnet").sites]
    before = sum(p.numel() for p in model.parameters())
    se_inject.inject(model, block=block)
    assert sum(p.numel() for p in model.parameters()) == before + plan.added_params


class Mine(nn.Module):
    def __init__(self, channels, rd_ratio=0.5):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Sigmoid()
        self.rd_ratio = rd_ratio

    def forward(self, x):
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))


class InPlace(Mine):
    def forward(self, x):
        return x.mul_(self.gate(self.fc(x.mean((2, 3), keepdim=True))))


@pytest.fixture
def registered():
    se_inject.register_block("mine", Mine, zero=("fc",), gates=("gate",))
    yield
    del catalogue._rows["mine"]


def test_a_block_of_ones_own(registered):
    check_identity(timm.create_model("test_resnet"), (3, 64, 64), block="mine")
    check_identity(timm.create_model("test_vit"), (3, 160, 160), block="mine")
    model = timm.create_model("se_inject/resnet18", se_block="mine", se_ratio=0.25)
    assert isinstance(model.layer1[0].se, Mine) and model.layer1[0].se.rd_ratio == 0.25
    with pytest.raises(se_inject.SEInjectError, match="there is a block of that name"):
        se_inject.register_block("mine", nn.Identity)
    with pytest.raises(se_inject.SEInjectError, match="expected a class of modules, not an object of it"):
        se_inject.register_block("other", Mine(8))
    with pytest.raises(se_inject.SEInjectError, match=r"expected names; write zero=\('fc',\)"):
        se_inject.register_block("other", Mine, zero="fc")
    assert "other" not in catalogue._rows
    assert get_block("mine").cls is Mine


class Changed(nn.Module):
    """A block with this forward."""

    def __init__(self, body):
        super().__init__()
        names = {}
        exec(f"def forward(self, x):\n    {body}", names)
        self.fc, self.forward = nn.Conv2d(16, 16, 1), names["forward"].__get__(self)


@pytest.mark.parametrize("row, message", [
    (Block("wrong_0", Mine, Start(("fd",))), "Mine has no module 'fd'.*fc, gate"),
    (Block("wrong_1", Mine, Start(("fc",), ("fc.weight",))), "Mine has no module 'fc.weight'"),
    (Block("wrong_2", Mine), "does not return its input at the start"),
    (Block("wrong_9", InPlace), "does not return its input at the start"),
    (Block("wrong_3", nn.Conv2d), "cannot be created for 16 channels.*its class has to accept"),
    (Block("wrong_4", lambda channels: nn.AdaptiveAvgPool2d(1)), "returns .* and a gate keeps the shape"),
    (Block("wrong_6", lambda channels: Changed("return x.mul_(2)")), "does not return its input at the start"),
    (Block("wrong_7", lambda channels: Changed("return x, self.fc(x)")), "it returns a tuple, and a gate returns a map"),
    (Block("wrong_8", lambda channels: Changed("return self.missing(x)")), "it raises AttributeError"),
    (Block("wrong_10", lambda channels: Changed("return x.detach()")), "none of its parameters would have a gradient"),
    (Block("wrong_5", lambda channels: nn.Identity()), "none of its parameters would have a gradient")])  # fmt: skip
def test_a_block_that_does_not_fit_is_refused_with_the_reason(monkeypatch, row, message):
    monkeypatch.setitem(catalogue._rows, row.name, row)
    model = timm.create_model("resnet18")
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.inject(model, block=row.name)
    assert not block_paths(model)


def test_a_block_that_works_in_place(monkeypatch):
    row = Block("in_place", InPlace, Start(("fc",), ("gate",)), weighs=True)
    monkeypatch.setitem(catalogue._rows, row.name, row)
    check_identity(timm.create_model("test_resnet"), (3, 64, 64), block="in_place")
    plan = se_inject.plan("test_resnet", block="in_place", placement="pre")  # the shortcut reads the same map
    assert not plan.sites and {s.reason for s in plan.skipped} == {
        "block='in_place' writes into its input, which is read elsewhere, too"}


def test_a_block_of_ones_own_goes_into_a_file(registered, tmp_path):
    model = se_inject.inject(timm.create_model("test_resnet"), block="mine").eval()
    with torch.no_grad():
        model.layer1[0].se.fc.weight.normal_()
    se_inject.save(model, tmp_path / "m.safetensors")
    again = se_inject.load(tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_block_that_is_fitted_to_its_site_is_one_row():
    """Width, layout and activation of `film` are those of `se`."""
    for name, args in (("test_resnet", {}), ("tiny_vit_5m_224", SHORT)):
        model = timm.create_model(name, **args)
        ours, theirs = se_inject.plan(model, block="film"), se_inject.plan(model)
        assert [dataclasses.replace(s, params=0, macs=0) for s in ours.sites] == [
            dataclasses.replace(s, style="film", params=0, macs=0) for s in theirs.sites]
        check_identity(model, (3, 64, 64), block="film")
    model = se_inject.inject(timm.create_model("efficientnet_lite0"), block="film", ratio=0.5, act_layer="silu")
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    assert all(isinstance(b, ScaleAndShift) and isinstance(b.act, nn.SiLU) for b in blocks)
    assert all(b.fc1.out_channels == s.rd_channels for b, s in zip(blocks, se_inject.plan(
        "efficientnet_lite0", ratio=0.5).sites, strict=True))
    model = se_inject.inject(timm.create_model("tiny_vit_5m_224", **SHORT), block="film")
    kinds = {s.layout: type(model.get_submodule(s.path).fc1) for s in theirs.sites}
    assert kinds == {"NCHW": nn.Conv2d, "NLC": nn.Linear, "NHWC": nn.Linear}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("block", ["se", "film"])
def test_files_copies_and_dtypes(name, block, tmp_path):
    """A trained block comes back from a file of blocks, from a full file, and from an EMA; its dtype is the model's."""
    model = randomise(timm.create_model(f"se_inject/{name}", se_block=block, se_bias=True)).eval()
    x, full, part = torch.randn(2, 3, 64, 64), tmp_path / "full.safetensors", tmp_path / "se.safetensors"
    se_inject.save(model, full)
    se_inject.save(model, part, only="se")
    base = se_inject.eject(copy.deepcopy(model))
    with torch.no_grad():
        y = model(x)
        assert not torch.allclose(base(x), y, atol=1e-3)
        assert torch.equal(se_inject.load(part, base)(x), y)
        assert torch.equal(timm.create_model(f"se_inject/{name}", se_block=block, checkpoint_path=str(full)).eval()(x), y)
        assert torch.equal(ModelEmaV3(model).module(x), y)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x) - y).norm() < 0.1 * y.norm()
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype is torch.bfloat16 and (half - y).norm() < 0.1 * y.norm()


def test_gather_excite_is_timms_but_for_the_layer_that_timm_cannot_make():
    from timm.layers import GatherExcite

    from se_inject.blocks.gather_excite import GatherExcite as Ours

    ours = Ours(16)
    theirs = GatherExcite(16, use_mlp=False)
    x = torch.randn(2, 16, 8, 8)
    theirs.mlp = ours.mlp
    assert isinstance(ours, GatherExcite) and torch.equal(ours(x), theirs(x))
