"""Base, full and SE-only weights go in by every door, and come back in a new process."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import se_inject
from se_inject import block_paths
from se_inject.errors import SEInjectError, WeightsError
from se_inject.weights.reading import read_checkpoint
from se_inject.weights.rebuild import base_architecture

from ..support.checks import randomise
from ..support.outputs import out

SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}  # of timm's resnet18 and its native twin


def test_load(files):
    folder, name, y, yb = files
    assert torch.equal(out(se_inject.load(folder / "full.safetensors")), y)
    assert torch.equal(out(se_inject.load(folder / "se.safetensors", base=folder / "base.safetensors")), y)
    assert torch.equal(out(se_inject.load(folder / "train.pth.tar")), y)
    assert torch.equal(out(se_inject.load(folder / "ema.pth", name)), y)
    assert torch.equal(out(se_inject.load(folder / "base.safetensors", name)), yb)
    given = timm.create_model(name)
    given.load_state_dict(load_file(folder / "base.safetensors"))
    assert se_inject.load(folder / "se.safetensors", given) is given
    assert given.training and torch.equal(out(given), y)


def test_base_by_one_door_and_blocks_by_another(files):
    folder, name, y, _ = files
    model = timm.create_model(
        f"se_inject/{name}", pretrained=True, pretrained_cfg_overlay={"file": str(folder / "base.safetensors")},
        checkpoint_path=str(folder / "se.safetensors"))
    assert torch.equal(out(model), y)


def test_pretrained_weights_adapt_to_another_head(files):
    folder, name, _, _ = files
    overlay = {"file": str(folder / "base.safetensors")}
    model = timm.create_model(f"se_inject/{name}", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(model.eval().forward_features(x), plain.eval().forward_features(x))
    assert model(x).shape == (1, 4)


def test_a_model_that_is_not_timms(tmp_path):
    def net():
        return torchvision.models.resnet18(num_classes=4).eval()

    model = randomise(se_inject.inject(net(), input_size=(3, 48, 48), ratio=0.5)).eval()
    se_inject.save(model, tmp_path / "a.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "a.safetensors", net())), out(model))
    with pytest.raises(WeightsError, match="does not say its architecture"):
        se_inject.load(tmp_path / "a.safetensors")


def test_several_injections_by_timms_door():
    model = timm.create_model("se_inject/resnet18", se_injections=[{"stages": 1, "ratio": 0.5}, {"stages": [4]}])
    assert model.layer1[0].se.fc1.out_channels == 32 and model.layer4[0].se.fc1.out_channels == 32
    with pytest.raises(se_inject.SEInjectError, match="no other se_ option"):
        timm.create_model("se_inject/resnet18", se_injections=[{}], se_ratio=0.5)


def test_base_blocks_and_head_from_three_files(tmp_path):
    first = randomise(timm.create_model("se_inject/test_resnet", num_classes=5)).eval()
    second = randomise(timm.create_model("se_inject/test_resnet"), seed=7).eval()
    for name, part in {"se": "se", "head": "head", "both": ("head", "se"), "full": None}.items():
        se_inject.save(first, tmp_path / f"{name}.safetensors", only=part)
    save_file({k: t for k, t in second.state_dict().items() if ".se." not in k}, tmp_path / "base.safetensors")
    sizes = {p.stem: p.stat().st_size for p in tmp_path.iterdir()}
    assert sizes["se"] < 50_000 and sizes["head"] < 4_000
    third = timm.create_model("se_inject/test_resnet", num_classes=5)
    state = {**second.state_dict(), **{k: t for k, t in first.state_dict().items() if ".se." in k or k.startswith("fc.")}}
    third.load_state_dict(state)
    y, base = out(third), tmp_path / "base.safetensors"
    for head in ("head", "full"):
        made = se_inject.load(tmp_path / "se.safetensors", base=base, head=tmp_path / f"{head}.safetensors")
        assert torch.equal(out(made), y)
    assert torch.equal(out(se_inject.load(tmp_path / "both.safetensors", base=base)), y)
    assert out(se_inject.load(tmp_path / "se.safetensors", base=base)).shape == (2, 1000)  # the head is the base's
    with pytest.raises(WeightsError, match="blocks and the head alone"):
        se_inject.load(tmp_path / "both.safetensors")
    with pytest.raises(WeightsError, match="no tensors of a classifier"):
        se_inject.load(tmp_path / "full.safetensors", head=tmp_path / "se.safetensors")
    with pytest.raises(se_inject.SEInjectError, match="only='heads'"):
        se_inject.save(first, tmp_path / "x.safetensors", only="heads")
    first.reset_classifier(0)
    with pytest.raises(WeightsError, match="no classifier"):
        se_inject.save(first, tmp_path / "x.safetensors", only="head")


def test_native_weights_need_the_plain_gate(tmp_path):
    native = randomise(timm.create_model("seresnet18", **SMALL)).eval()
    path, y = tmp_path / "seresnet18.safetensors", out(native)
    save_file(native.state_dict(), path)
    assert torch.equal(out(timm.create_model("se_inject/resnet18", **SMALL, se_init="timm", checkpoint_path=str(path))), y)
    overlay = {"file": str(path)}
    model = timm.create_model("se_inject/resnet18", **SMALL, se_init="timm", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(out(model), y)
    assert torch.equal(out(se_inject.load(path, "resnet18", init="timm", model_args=SMALL)), y)
    se_inject.save(model, tmp_path / "ours.safetensors")
    with pytest.raises(WeightsError, match="blocks were made with"):  # the same tensors, twice the gate
        se_inject.load(tmp_path / "ours.safetensors", timm.create_model("se_inject/resnet18", **SMALL))


def test_an_se_only_file_needs_a_base(tmp_path):
    se_inject.save(se_inject.inject(timm.create_model("test_resnet")), tmp_path / "se.safetensors", only="se")
    with pytest.raises(WeightsError, match="base=FILE"):
        se_inject.load(tmp_path / "se.safetensors")
    with pytest.raises(WeightsError, match="no file"):
        se_inject.load(tmp_path / "none.safetensors")
    with pytest.raises(se_inject.SEInjectError, match="its own recipe"):
        se_inject.load(tmp_path / "se.safetensors", ratio=0.5)
    with pytest.raises(WeightsError, match="no blocks"):
        se_inject.save(timm.create_model("test_resnet"), tmp_path / "x.safetensors")


def test_an_argument_that_would_be_ignored_is_refused(tmp_path):
    first = randomise(timm.create_model("se_inject/test_resnet"))
    plain = randomise(timm.create_model("se_inject/test_resnet", se_init="timm"), seed=3)
    for name, model in {"a": first, "b": plain}.items():
        for part in ("se", "head", None):
            se_inject.save(model, tmp_path / f"{name}-{part or 'full'}.safetensors", only=part)
    full, se, head = (tmp_path / f"a-{part}.safetensors" for part in ("full", "se", "head"))
    with pytest.raises(WeightsError, match="none would be taken from there"):
        se_inject.load(full, base=tmp_path / "b-full.safetensors")
    with pytest.raises(WeightsError, match="blocks were made with"):  # the blocks come from the base file, with another gate
        se_inject.load(head, base=tmp_path / "b-full.safetensors")
    made = se_inject.load(tmp_path / "b-head.safetensors", base=tmp_path / "b-full.safetensors")
    assert torch.equal(out(made), out(plain))
    save_file(first.state_dict(), tmp_path / "bare.safetensors")
    for path, model, kwargs in (
            (se, timm.create_model("test_resnet"), {"pretrained": True}),
            (full, timm.create_model("test_resnet"), {"model_args": {"num_classes": 5}}),
            (full, timm.create_model("test_resnet"), {"dtype": torch.bfloat16}),
            (full, timm.create_model("test_resnet"), {"device": "cpu"}),
            (tmp_path / "bare.safetensors", timm.create_model("se_inject/test_resnet"), {"ratio": 0.5})):
        before = {k: t.clone() for k, t in model.state_dict().items()}
        with pytest.raises(se_inject.SEInjectError, match="already made"):
            se_inject.load(path, model, **kwargs)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_half_a_head_is_an_error(tmp_path):
    for name in ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        se_inject.save(timm.create_model(f"se_inject/{name}", img_size=32, num_classes=4, depth=2), tmp_path / name)
    with pytest.raises(WeightsError, match=r"head_dist\.weight"):
        name = "deit_tiny_distilled_patch16_224"
        se_inject.load(tmp_path / name, name, head=tmp_path / "deit_tiny_patch16_224")


def test_a_head_alone_goes_over_a_model_with_weights(tmp_path, written):
    model, state, _ = written
    se_inject.save(model, tmp_path / "head.safetensors", only="head")
    for name in ("test_resnet", "se_inject/test_resnet"):
        given = randomise(timm.create_model(name), seed=5)
        before = {k: t.clone() for k, t in given.state_dict().items()}
        after = se_inject.load(tmp_path / "head.safetensors", given).state_dict()
        assert all(torch.equal(after[k], state[k] if k.startswith("fc.") else before[k]) for k in before)
    with pytest.raises(RuntimeError, match="Missing key"):  # as for any model
        given.load_state_dict(load_file(tmp_path / "head.safetensors"))


def test_a_model_with_a_part_called_module(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = timm.create_model("test_resnet")

        def forward(self, x):
            return self.module(x)

    model = randomise(se_inject.inject(Net())).eval()
    se_inject.save(model, tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(se_inject.load(tmp_path / "m.safetensors", Net()).eval()(x), model(x))


def test_a_feature_wrapper_comes_back(tmp_path):
    def net():
        return timm.create_model("test_resnet", features_only=True, out_indices=(2, 4)).eval()

    model, path = randomise(se_inject.inject(net())).eval(), tmp_path / "m.safetensors"
    se_inject.save(model, path)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(se_inject.load(path, net())(x), model(x), strict=True))


def test_a_base_of_another_architecture_is_refused(tmp_path):
    for name, part in {"efficientnet_lite0": "se", "tf_efficientnet_lite0": None}.items():  # equal shapes, other padding
        se_inject.save(timm.create_model(f"se_inject/{name}"), tmp_path / name, only=part)
    files = tmp_path / "efficientnet_lite0", tmp_path / "tf_efficientnet_lite0"
    with pytest.raises(WeightsError, match="is of efficientnet_lite0, and base="):
        se_inject.load(files[0], base=files[1])
    assert block_paths(se_inject.load(files[0], "tf_efficientnet_lite0", base=files[1]))
    with pytest.raises(WeightsError, match="is of tf_efficientnet_lite0, and head="):
        se_inject.load(files[1], head=files[0])


def test_a_file_without_values_and_a_tag_that_timm_does_not_have(tmp_path):
    torch.save(timm.create_model("test_resnet").to("meta").state_dict(), tmp_path / "m.pth")
    with pytest.raises(WeightsError, match="tensors have no values"):
        se_inject.load(tmp_path / "m.pth", "test_resnet")
    with pytest.raises(WeightsError, match="leave its tag out"):
        se_inject.load(tmp_path / "m.pth", "test_resnet.typo")


def test_arguments_of_the_user_win_over_those_of_the_files(tmp_path):
    base = randomise(timm.create_model("test_resnet"))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    se_inject.save(timm.create_model("se_inject/test_resnet"), tmp_path / "se.safetensors", only="se")
    with pytest.raises(WeightsError, match="fc"):
        se_inject.load(tmp_path / "se.safetensors", base=tmp_path / "base.safetensors", model_args={"num_classes": 10})


def test_options_of_several_injections_belong_to_their_sites(tmp_path):
    def net(first, second):
        model = se_inject.inject(timm.create_model("test_resnet"), stages=1, rd_channels=8, act_layer=first)
        return se_inject.inject(model, stages=(2, 3, 4), rd_channels=8, act_layer=second)

    model = randomise(net("silu", "relu")).eval()
    se_inject.save(model, tmp_path / "m.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "m.safetensors", net("silu", "relu"))), out(model))
    with pytest.raises(WeightsError, match="blocks were made with"):
        se_inject.load(tmp_path / "m.safetensors", net("relu", "silu"))


def test_a_base_file_without_base_weights_is_an_error(tmp_path):
    """Otherwise the model would keep the random base that was built for the weights."""
    net = se_inject.inject(timm.create_model("test_resnet"))
    se_inject.save(net, tmp_path / "se.safetensors", only="se")
    se_inject.save(net, tmp_path / "both.safetensors", only=("se", "head"))
    for kind in ("se", "both"):
        for base in ("se", "both"):
            with pytest.raises(WeightsError, match=r"no weights of the base|none would be taken from there"):
                se_inject.load(tmp_path / f"{kind}.safetensors", base=tmp_path / f"{base}.safetensors")
        tensors = load_file(tmp_path / f"{kind}.safetensors")
        torch.save(tensors, tmp_path / "plain.pth")
        with pytest.raises(WeightsError, match="no weights of the base"):
            se_inject.load(tmp_path / "plain.pth", "test_resnet")
        into = se_inject.load(tmp_path / "plain.pth", se_inject.inject(timm.create_model("test_resnet")))  # which has weights
        assert all(torch.equal(into.state_dict()[k], t) for k, t in tensors.items())


def test_a_model_without_memory_is_refused(tmp_path):
    se_inject.save(se_inject.inject(timm.create_model("test_resnet")), tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    with pytest.raises(WeightsError, match="on the meta device, without memory"):
        se_inject.load(tmp_path / "m.safetensors", model)
    assert not block_paths(model)


def test_weights_of_attention_that_is_replaced_are_not_taken_for_those_of_the_blocks(tmp_path):
    model = randomise(timm.create_model("se_inject/seresnet18", se_existing="replace")).eval()
    timm.models._hub.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    assert torch.equal(out(se_inject.load(tmp_path / "folder")), out(model))
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    again = se_inject.load(tmp_path / "bare.safetensors", "se_inject/seresnet18", existing="replace")
    assert torch.equal(out(again), out(model))
    for name in ("seresnet18", timm.create_model("seresnet18")):
        with pytest.raises(WeightsError, match=r"does not say whether layer1\.0\.se\.fc1\.weight is a weight of the base"):
            se_inject.load(tmp_path / "bare.safetensors", name, existing="replace")


def test_attention_that_blocks_replaced_is_put_back_as_the_model_is_now_or_not_at_all(tmp_path):
    base = randomise(timm.create_model("seresnet18")).eval()
    expected, classes = out(base), [type(m) for m in base.modules()]
    model = se_inject.inject(base.train(), existing="replace").eval().double().float()
    se_inject.save(model, tmp_path / "m.safetensors")
    assert model.load_state_dict(model.state_dict()).missing_keys == []  # nothing is lost
    loaded = se_inject.load(tmp_path / "m.safetensors")
    loaded.fc.to("meta")
    for _ in range(2):
        with pytest.raises(SEInjectError, match="are not in the file of the model: take the base from"):
            se_inject.eject(loaded)
        loaded = se_inject.load(tmp_path / "m.safetensors")
    assert len(block_paths(loaded)) == 8 and torch.equal(out(loaded), out(model))
    se_inject.eject(model.double())
    assert [type(m) for m in model.modules()] == classes and {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(m.training for m in model.modules()) and torch.equal(out(model.float()), expected)


def test_the_tag_of_a_base_is_in_the_recipe_where_the_name_alone_means_another(tmp_path):
    for name, said in (("resnet18.tv_in1k", "resnet18.tv_in1k"), ("resnet18", "resnet18")):
        model = timm.create_model(f"se_inject/{name}")
        se_inject.save(model, tmp_path / "m.safetensors")
        again = se_inject.load(tmp_path / "m.safetensors")
        assert read_checkpoint(tmp_path / "m.safetensors").architecture == said
        assert timm.data.resolve_model_data_config(again) == timm.data.resolve_model_data_config(model)
        assert again.pretrained_cfg["tag"] == model.pretrained_cfg["tag"]
    found = read_checkpoint(tmp_path / "m.safetensors")
    unknown = dataclasses.replace(found, architecture="resnet18.of_another_timm")
    assert base_architecture(unknown, None, "m") == "resnet18"
    with pytest.raises(WeightsError, match="leave its tag out"):
        base_architecture(found, "resnet18.of_another_timm", "m")


@pytest.mark.parametrize("arguments, message", [
    ({"device": "foo"}, "device='foo'"), ({"device": "cuda:77"}, "cuda"),
    ({"dtype": "float16"}, "expected a floating point type"),
    ({"dtype": torch.int32}, "expected a floating point type"), ({"model_args": "abc"}, "expected a dict of arguments"),
    ({"model_args": {1: 2}}, "expected a dict of arguments"), ({"model": 3}, "expected a timm name or a model"),
    ({"model": ""}, "expected a timm name or a model"), ({"model": nn.Linear}, "expected a timm name or a model"),
    ({"base": 3}, "cannot read 3"), ({"head": b"x"}, "cannot read b'x'"), ({"path": None}, "cannot read None"),
    ({"path": "a\0b"}, "cannot read"), ({"path": "a" * 5000}, "cannot read"),
    ({"model_args": {"se_init": "timm"}}, "has its own recipe, so that se_init cannot be set")])
def test_arguments_of_load_of_another_kind(tmp_path, arguments, message):
    path = tmp_path / "m.safetensors"
    se_inject.save(timm.create_model("se_inject/test_resnet"), path)
    with pytest.raises(SEInjectError, match=message):
        se_inject.load(**{"path": path, **arguments})


def test_paths_that_are_none_and_scripted_models(tmp_path):
    model, path = timm.create_model("se_inject/test_resnet"), tmp_path / "m.safetensors"
    for wrong in (3, None, b"a\0b", ["m"]):
        with pytest.raises(SEInjectError, match="cannot write"):
            se_inject.save(model, wrong)
    se_inject.save(model, path)
    with pytest.raises(SEInjectError, match="is a TorchScript module"):
        se_inject.load(path, torch.jit.script(timm.create_model("test_resnet")))


def test_options_of_several_injections_are_not_ignored(tmp_path):
    said = argparse.Namespace(model_kwargs={"se_injections": [{"stages": 3}, {"stages": 4, "block": "eca"}]})
    torch.save({"arch": "se_inject/test_resnet", "state_dict": timm.create_model("test_resnet").state_dict(), "args": said},
               tmp_path / "c.pth.tar")
    with pytest.raises(SEInjectError, match="says several injections, so that init, stages cannot be set"):
        se_inject.load(tmp_path / "c.pth.tar", stages=1, init="timm")
    assert len(block_paths(se_inject.load(tmp_path / "c.pth.tar"))) == 2


def test_blocks_of_a_model_without_a_classifier_over_a_base_with_one(tmp_path):
    base = randomise(timm.create_model("test_resnet"))
    torch.save(base.state_dict(), tmp_path / "base.pth")
    model = se_inject.inject(timm.create_model("test_resnet", num_classes=0))
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    loaded = se_inject.load(tmp_path / "se.safetensors", base=tmp_path / "base.pth")
    base.reset_classifier(0)
    assert loaded.num_classes == 0 and torch.equal(out(loaded), out(base.eval()))


def test_a_head_of_a_model_for_other_images(tmp_path):
    one, other = (randomise(timm.create_model("se_inject/test_resnet", **args)).eval() for args in (
        {}, {"in_chans": 1, "num_classes": 5}))
    se_inject.save(one, tmp_path / "a.safetensors")
    se_inject.save(other, tmp_path / "b.safetensors")
    loaded = se_inject.load(tmp_path / "a.safetensors", head=tmp_path / "b.safetensors")
    assert torch.equal(loaded.fc.weight, other.fc.weight) and torch.equal(loaded.conv1[0].weight, one.conv1[0].weight)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.ModuleDict({name: torchvision.models.resnet.BasicBlock(8, 8) for name in ("a[0]", "a0")})
        self.stem = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.b["a0"](self.b["a[0]"](self.stem(x)))


def test_names_with_the_characters_of_globs(tmp_path):
    model = se_inject.inject(Named(), input_size=(3, 16, 16), filter_fn=lambda s: "[0]" in s.path)
    se_inject.save(model, tmp_path / "m.safetensors")
    assert block_paths(se_inject.load(tmp_path / "m.safetensors", Named())) == block_paths(model) == ["b.a[0].se"]


def test_injecting_again_says_to_eject():
    model = timm.create_model("se_inject/test_resnet")
    for existing in ("skip", "stack", "replace"):
        with pytest.raises(SEInjectError, match=r"4 sites already .*, of an earlier injection: eject\(model\)"):
            se_inject.inject(model, existing=existing)
