"""`load_state_dict` of an injected model takes base, full and SE-only weights, and no others."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import se_inject
from se_inject.errors import WeightsError

from ..support.checks import randomise
from ..support.outputs import out


def test_load_state_dict_says_what_it_did(files, caplog):
    folder, name, y, yb = files
    model = timm.create_model(f"se_inject/{name}")
    base, se = load_file(folder / "base.safetensors"), load_file(folder / "se.safetensors")
    with caplog.at_level(logging.INFO, "se_inject"):
        caplog.clear()
        model.load_state_dict(base)
        assert torch.equal(out(model), yb)
        model.load_state_dict(se)
        assert torch.equal(out(model), y)
        model.load_state_dict(base)  # the blocks keep their trained weights
        assert torch.equal(out(model), y)
    assert caplog.messages == [
        f"{len(base)} base tensors loaded, {len(se)} SE tensors at identity",
        f"{len(base)} base tensors kept, {len(se)} SE tensors loaded",
        f"{len(base)} base tensors loaded, {len(se)} SE tensors kept"]
    timm.models.load_checkpoint(model, str(folder / "full.safetensors"))
    assert torch.equal(out(model), y)
    wrapped = torch.nn.Sequential(model)
    wrapped.load_state_dict({f"0.{k}": t for k, t in base.items()})
    broken = dict(base)
    broken.pop(next(k for k, t in base.items() if t.dim() == 4))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(broken)


def test_a_part_of_a_block_is_an_error(files):
    folder, name, _, _ = files
    model = timm.create_model(f"se_inject/{name}")
    state = load_file(folder / "full.safetensors")
    state.pop(next(iter(load_file(folder / "se.safetensors"))))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


class _Loads(nn.Sequential):
    def _load_from_state_dict(self, *args):
        self.said.append(1)
        super()._load_from_state_dict(*args)


@pytest.mark.parametrize("own", [
    lambda m: m.layer2.register_load_state_dict_post_hook(lambda module, _: module.said.append(1)),
    lambda m: m.layer2.register_load_state_dict_pre_hook(lambda module, *_: module.said.append(1)),
    lambda m: setattr(m.layer2, "__class__", _Loads),
    lambda m: m.register_state_dict_post_hook(
        lambda module, state, *_: module.layer2.said.append(state.update({k: t.clone() for k, t in state.items()})))],
    ids=["post hook", "pre hook", "method", "copies"])
def test_a_module_with_its_own_way_to_load_is_asked(tmp_path, own):
    written = randomise(se_inject.inject(timm.create_model("test_resnet")))
    se_inject.save(written, tmp_path / "m.safetensors")
    model = se_inject.inject(timm.create_model("test_resnet"))
    model.layer2.said = []
    own(model)
    se_inject.load(tmp_path / "m.safetensors", model)
    assert model.layer2.said
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in written.state_dict().items())


class _Extra(nn.Sequential):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.fails:
            raise self.fails


def _expanded(model):
    model.register_buffer("odd", torch.zeros(1).expand(3))


def _inference(model):
    with torch.inference_mode():
        model.layer3.register_buffer("odd", torch.zeros(3))


def _freed(model):
    model.register_buffer("odd", torch.zeros(3))
    model.odd.untyped_storage().resize_(0)


def _raises(error):
    def odd(model):
        model.register_buffer("odd", torch.zeros(3))
        model.layer3.__class__ = _Extra
        model.layer3.fails = error
    return odd


def _both(*odd):
    return lambda model: [each(model) for each in odd]


ODD = {  # what is odd, and the error; None is a load that works
    "expanded": (_expanded, r"several values are one in memory.*\(odd\).*clone"),
    "inference": (_inference, None),
    "expanded, own code": (_both(_raises(None), _expanded), r"several values"),
    "inference, own code": (lambda model: (_inference(model), setattr(model.layer3, "__class__", _Extra),
                                           setattr(model.layer3, "fails", None)), None),
    "freed": (_freed, r"no memory \(odd\)"),
    "own code": (_raises(None), None),
    "own code that raises": (_raises(RuntimeError("no luck")), "no luck"),
    "interrupted": (_raises(KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize("injected", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_a_given_model_is_loaded_whole_or_not_at_all(tmp_path, odd, injected):
    make, error = ODD[odd]
    net = timm.create_model("test_resnet")
    (net.layer3 if "inference" in odd else net).register_buffer("odd", torch.arange(3.0))
    written = randomise(se_inject.inject(net))
    se_inject.save(written, tmp_path / "m.safetensors")
    model = timm.create_model("test_resnet")
    if injected:
        se_inject.inject(model)
    make(model)

    def values():
        state = model.state_dict()
        return {k: torch.empty(0) if odd == "freed" and k == "odd" else t.clone() for k, t in state.items()}

    before = values()
    if error is None:
        se_inject.load(tmp_path / "m.safetensors", model)
        assert all(torch.equal(t, model.state_dict()[k]) for k, t in written.state_dict().items())
        return
    kind, match = (WeightsError, error) if isinstance(error, str) else (error, None)
    with pytest.raises(kind, match=match):
        se_inject.load(tmp_path / "m.safetensors", model)
    after = values()
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("own_code", [False, True])
def test_an_expanded_buffer_that_has_its_value_stays(tmp_path, own_code):
    def net(value):
        model = timm.create_model("test_resnet")
        model.register_buffer("scale", torch.full((1,), value).expand(4))
        return se_inject.inject(model)

    written = randomise(net(2.0).eval())
    written.scale = torch.full((1,), 2.0).expand(4)
    se_inject.save(written, tmp_path / "m.safetensors")
    model = net(2.0).eval()
    if own_code:
        model.register_load_state_dict_post_hook(lambda *_: None)
    se_inject.load(tmp_path / "m.safetensors", model)
    assert torch.equal(out(model), out(written)) and model.scale.stride() == (0,)
