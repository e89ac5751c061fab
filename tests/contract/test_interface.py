"""timm's interface on injected models: all of it works, and means what it means on the base.

`pytest` runs small models of the layouts and kinds of blocks, and `pytest -m contract` more families.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters
from timm.models._manipulate import reparameterize_model
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import freeze, get_state_dict, unfreeze, unwrap_model

import se_inject
from se_inject import block_paths

from ..support.checks import randomise
from ..support.tiers import contract
from .test_identity import smallest_size

QUICK = [
    "test_resnet", "test_efficientnet", "mobilenetv2_035", "test_vit", "test_convnext", "test_coatnet", "vgg11",
]  # fmt: skip
MORE = [
    "swin_tiny_patch4_window7_224", "nf_resnet26", "densenet121", "vit_tiny_patch16_dinov3_qkvb", "gmlp_ti16_224",
    "mobilevit_xxs", "fastvit_t8", "repvit_m1", "mobileone_s0", "xcit_nano_12_p8_224", "levit_128s", "hrnet_w18_small",
    "xception41p", "cs3darknet_focus_s", "regnetx_002", "edgenext_xx_small",
]  # fmt: skip

# without these its head is most of it
KWARGS = {"vgg11": {"mlp_ratio": 0.02}}


def make(name):
    """A base in eval mode, its twin with equal weights, and an image."""
    base = randomise(timm.create_model(name, **KWARGS.get(name, {}))).eval()
    size = smallest_size(name, base)
    ours = se_inject.inject(copy.deepcopy(base))
    return base, ours, torch.randn(2, *size, generator=torch.Generator().manual_seed(1))


def grouped(name, *marks):
    return pytest.param(name, marks=[pytest.mark.xdist_group(f"interface {name}"), *marks])


@pytest.fixture(scope="module", params=[*map(grouped, QUICK), *(grouped(n, pytest.mark.contract) for n in MORE)])
def made(request):
    return make(request.param)


@pytest.fixture
def three(made):
    return copy.deepcopy(made)


@torch.no_grad()
def open_gates(model):
    """Give the blocks random weights, in place, so that they act."""
    g = torch.Generator().manual_seed(4)
    for path in block_paths(model):
        for p in model.get_submodule(path).parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return model


def flat(y):
    """The tensors of a result, in order."""
    if isinstance(y, torch.Tensor):
        return [y]
    return [t for i in (y.values() if isinstance(y, dict) else y) for t in flat(i)] if y is not None else []


def equal(a, b):
    a, b = flat(a), flat(b)
    return len(a) == len(b) > 0 and all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


def of_base(mine, model):
    """Without what a twin says of its blocks."""
    prefixes = tuple(f"{p}." for p in block_paths(model))
    return {k: v for k, v in mine.items() if not k.startswith(prefixes) and k + "." not in prefixes}


CALLS = {
    "forward": lambda m, x: m(x),
    "features": lambda m, x: m.forward_features(x),
    "head": lambda m, x: m.forward_head(m.forward_features(x)),
    "pre_logits": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "intermediates": lambda m, x: m.forward_intermediates(x),
    "two": lambda m, x: m.forward_intermediates(x, indices=[0, -1], intermediates_only=True, output_fmt="NCHW"),
    "last": lambda m, x: m.forward_intermediates(x, indices=1, norm=True, stop_early=True),
    "tokens": lambda m, x: m.forward_intermediates(x, indices=2, output_fmt="NLC", return_prefix_tokens=True),
}


@torch.no_grad()
def results(model, x):
    """What each call gives; the type of the error where the model does not have it."""
    out = {}
    for name, call in CALLS.items():
        try:
            out[name] = call(model, x)
        except (AttributeError, AssertionError, TypeError, NotImplementedError) as error:
            out[name] = type(error)
    return out


def test_every_call(three):
    base, ours, x = three
    theirs, mine = results(base, x), results(ours, x)
    open_gates(ours)
    acting = results(ours, x)
    assert not isinstance(theirs["head"], type)
    for name, y in theirs.items():
        if isinstance(y, type):
            assert mine[name] is acting[name] is y
        else:
            assert equal(mine[name], y), name
            assert not equal(acting[name], y), name
    assert equal(acting["head"], acting["forward"])
    with torch.no_grad():
        assert equal(ours.forward_head(acting["features"]), base.forward_head(acting["features"]))


def test_what_a_model_says_of_itself(three, tmp_path):
    base, ours, x = three
    for attribute in ("num_features", "head_hidden_size", "num_classes", "feature_info"):
        assert getattr(ours, attribute, None) == getattr(base, attribute, None), attribute
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg == {**base.pretrained_cfg, "architecture": f"se_inject/{base.pretrained_cfg['architecture']}"}
    assert resolve_model_data_config(ours) == resolve_model_data_config(base)
    assert [m.state_dict().keys() for m in classifiers(ours)] == [m.state_dict().keys() for m in classifiers(base)]
    assert no_decay(ours) == no_decay(base)
    for model in (base, ours):
        torch.manual_seed(0)
        model.reset_classifier(7)
    assert ours.num_classes == 7 and all(m in set(ours.modules()) for m in classifiers(ours))
    open_gates(ours)
    ours.eval()
    with torch.no_grad():
        y = ours(x)
        assert flat(y)[0].shape == (2, 7)
        se_inject.save(ours, tmp_path / "m.safetensors")
        assert equal(se_inject.load(tmp_path / "m.safetensors")(x), y)
        for model in (base, ours):
            model.reset_classifier(0)
            model.eval()
        assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(base(x))]


def classifiers(model):
    head = model.get_classifier()
    return list(head) if isinstance(head, tuple) else [head]


def no_decay(model):
    return set(getattr(model, "no_weight_decay", set)()), set(getattr(model, "no_weight_decay_keywords", set)())


def trained(model, x):
    """How often each module is called in a training step, and the gradients."""
    calls = Counter()
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: calls.update([name])) for name, m in model.named_modules()]
    torch.manual_seed(0)
    model.train()
    sum(t.square().mean() for t in flat(model(x))).backward()
    for h in handles:
        h.remove()
    return dict(calls), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(three):
    base, ours, x = three
    try:
        base.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        with pytest.raises(type(error)):
            ours.set_grad_checkpointing(True)
        pytest.skip("timm's own model has no gradient checkpointing")
    open_gates(ours)
    plain = copy.deepcopy(ours)
    ours.set_grad_checkpointing(True)
    once, grads = trained(plain, x)
    twice, again = trained(ours, x)
    expected, _ = trained(base, x)
    learned = [k for k, m in base.named_modules() if m._parameters]  # torch stops before a last dropout, which saves nothing
    assert {k: twice.get(k) for k in learned} == {k: expected.get(k) for k in learned}
    assert grads.keys() == again.keys() and all(torch.equal(grads[k], again[k]) for k in grads)
    recomputed = [p for p in block_paths(ours) if twice[p] > once[p]]
    owners = [p for p in block_paths(ours) if expected[p.rpartition(".")[0]] > once[p.rpartition(".")[0]]]
    assert recomputed == owners
    assert any(n > once[k] for k, n in expected.items() if k in once)


def test_layer_decay(three):
    base, ours, _ = three
    assert hasattr(ours, "group_matcher") == hasattr(base, "group_matcher")
    for coarse in (False, True) if hasattr(base, "group_matcher") else ():
        layers, mine = (group_parameters(m, m.group_matcher(coarse=coarse), reverse=True) for m in (base, ours))
        assert of_base(mine, ours) == layers
        for path in block_paths(ours):
            owner = path.rpartition(".")[0]
            (layer,) = {n for k, n in mine.items() if k.startswith(f"{path}.")}
            assert layer in {n for k, n in layers.items() if k.startswith(f"{owner}.")}, path
    theirs = scales(base, param_groups_layer_decay(base, 0.05, layer_decay=0.75))
    mine = scales(ours, param_groups_layer_decay(ours, 0.05, layer_decay=0.75))
    assert mine.keys() == {k for k, _ in ours.named_parameters()}
    assert of_base(mine, ours) == theirs
    optimizer = create_optimizer_v2(ours, "adamw", weight_decay=0.05, layer_decay=0.75, filter_bias_and_bn=True)
    groups = scales(ours, optimizer.param_groups)
    assert groups.keys() == mine.keys()
    parameters = dict(ours.named_parameters())
    for path in block_paths(ours):
        decay = {k: groups[k][1] for k in groups if k.startswith(f"{path}.")}
        assert all((weight_decay == 0) == (parameters[k].ndim <= 1) for k, weight_decay in decay.items())


def scales(model, groups):
    """Learning rate scale and weight decay of each parameter, by name."""
    names = {id(p): k for k, p in model.named_parameters()}
    return {names[id(p)]: (g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}


def test_pruned_to_its_first_layers(three):
    base, ours, x = three
    try:
        kept = base.prune_intermediate_layers(1, prune_norm=True)
    except (AttributeError, AssertionError) as error:
        with pytest.raises(type(error)):
            ours.prune_intermediate_layers(1, prune_norm=True)
        pytest.skip("timm's own model cannot be pruned")
    assert ours.prune_intermediate_layers(1, prune_norm=True) == kept
    with torch.no_grad():
        assert equal(ours.forward_intermediates(x, indices=1), base.forward_intermediates(x, indices=1))
    assert of_base(ours.state_dict(), ours).keys() == base.state_dict().keys()


@pytest.mark.parametrize("name, kwargs", [
    ("test_vit", {"img_size": 96}), ("test_vit", {"img_size": 128, "patch_size": 8}),
    ("test_coatnet", {"img_size": 96}), ("deit_tiny_distilled_patch16_224", {"img_size": 96}),
    *contract(
        ("swin_tiny_patch4_window7_224", {"img_size": 128, "window_size": 4}), ("efficientvit_m0", {"img_size": 256}),
        ("vit_tiny_patch16_dinov3_qkvb", {"img_size": 96})),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")  # timm's
def test_set_input_size(name, kwargs):
    base, ours, _ = make(name)
    x = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    for model in (base, ours):
        model.set_input_size(**kwargs)
    with torch.no_grad():
        expected = base(x)
        assert equal(ours(x), expected)
        assert equal(copy.deepcopy(ours)(x), expected)
        assert not equal(open_gates(ours)(x), expected)


@pytest.mark.parametrize("name, kwargs, sides", [
    ("test_vit", {"img_size": 96}, [96]),
    ("test_vit", {"dynamic_img_size": True}, [96, 128]),
    ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}, [90, 160]),
    ("vit_tiny_patch16_dinov3_qkvb", {"dynamic_img_size": True}, [96, 128]),
    *contract(("swin_tiny_patch4_window7_224", {"img_size": 112, "strict_img_size": False}, [112, 96])),
])  # fmt: skip
def test_other_sizes_at_creation(name, kwargs, sides):
    base = randomise(timm.create_model(name, **kwargs)).eval()
    ours = timm.create_model(f"se_inject/{name}", **kwargs).eval()
    ours.load_state_dict(base.state_dict())
    acting = open_gates(copy.deepcopy(ours))
    for side in sides:
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            assert equal(ours(x), base(x))
            assert not equal(acting(x), base(x))


@pytest.mark.parametrize("name", [
    "repvgg_a0", "levit_128s", "shvit_s1",
    *contract("mobileone_s0", "fastvit_t8", "repvit_m1", "repghostnet_050", "lcnetv2_small")])
def test_reparameterized(name):
    base, ours, x = make(name)
    open_gates(ours)
    before = {k: copy.deepcopy(ours.get_submodule(k)) for k in block_paths(ours)}
    with torch.no_grad():
        y, mine = base(x), ours(x)
        fused = reparameterize_model(base).eval()
        error = distance(fused(x), y)
        assert error < 1e-2, "timm's own model"
        result = reparameterize_model(ours).eval()
        assert distance(result(x), mine) < 10 * error + 1e-5
        assert len(list(result.modules())) < len(list(ours.modules()))
        for path, block in before.items():
            blocks = [m for k, m in result.named_modules() if k == path]
            assert blocks and equal(list(blocks[0].parameters()), list(block.parameters()))
        # and into what is reparameterized already
        if not isinstance(fused, torch.nn.Sequential):
            after = se_inject.inject(copy.deepcopy(fused))
            assert equal(after(x), fused(x))


def distance(a, b):
    """The largest difference, relative to the largest value."""
    a, b = torch.cat([t.flatten() for t in flat(a)]), torch.cat([t.flatten() for t in flat(b)])
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "levit_128s", *contract("repvit_m1")])
def test_other_norms_and_frozen_parts(name):
    base, ours, x = make(name)
    first = next(n for n, m in base.named_children() if list(m.parameters()))
    for model in (base, ours):
        freeze(model, first)
    assert {k for k, p in ours.named_parameters() if not p.requires_grad} >= {
        k for k, p in base.named_parameters() if not p.requires_grad} != set()
    with torch.no_grad():
        expected = base(x)
        assert equal(ours(x), expected)
        for model in (base, ours):
            unfreeze(model, first)
            model.eval()  # the norms are new
        expected = base(x)  # of another class of norm, which rounds in another way
        assert equal(ours(x), expected) and all(p.requires_grad for p in ours.parameters())
        synced, theirs = convert_sync_batchnorm(copy.deepcopy(ours)), convert_sync_batchnorm(copy.deepcopy(base))
        assert of_base(synced.state_dict(), ours).keys() == theirs.state_dict().keys()
        assert equal(list(synced.state_dict().values()), list(ours.state_dict().values()))
        assert equal(synced(x), expected)
    assert unwrap_model(torch.nn.DataParallel(ours)) is ours
    assert get_state_dict(ours).keys() == ours.state_dict().keys()


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", *contract("efficientformerv2_s0")])
def test_distilled_training(name):
    base, ours, x = make(name)
    for model in (base, ours):
        model.set_distilled_training(True)
        model.train()
    torch.manual_seed(0)
    y = base(x)
    torch.manual_seed(0)
    assert equal(ours(x), y)
