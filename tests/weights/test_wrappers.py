"""Files into a model that holds an injected one, as the wrappers of Lightning and segmentation libraries hold a timm twin."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import se_inject
from se_inject.errors import WeightsError

from ..support.checks import randomise
from ..support.outputs import out


class Wrapper(nn.Module):
    """A timm model by its name, and a head with a residual branch of its own."""

    def __init__(self, name="se_inject/test_resnet", **options):
        super().__init__()
        self.net = timm.create_model(name, num_classes=0, **options)
        c = self.net.num_features
        self.branch = nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU(), nn.Conv2d(c, c, 1))

    def forward(self, x):
        y = self.net.forward_features(x)
        return (y + self.branch(y)).mean((2, 3))


def twin(**options):
    return randomise(Wrapper(**options), seed=9).eval()


def injected(**options):
    """A wrapper of the plain model, in which `inject` has found the blocks of the twin."""
    return randomise(se_inject.inject(Wrapper("test_resnet"), input_size=(3, 64, 64), include="net.*", **options)).eval()


def assert_unchanged_by(load, model):
    """A refused load leaves weights, blocks and classes as they were."""
    before = {k: t.clone() for k, t in model.state_dict().items()}
    blocks, kinds, y = se_inject.block_paths(model), [type(m) for m in model.modules()], out(model)
    with pytest.raises(WeightsError) as error:
        load()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[k]) for k, t in before.items())
    assert blocks == se_inject.block_paths(model) and kinds == [type(m) for m in model.modules()] and torch.equal(out(model), y)
    return str(error.value)


@pytest.mark.parametrize("suffix, prefix", [("safetensors", ""), ("ckpt", "model.")])
def test_a_state_dict_goes_into_the_blocks_that_are_there(suffix, prefix, tmp_path):
    trained, path = randomise(Wrapper()).eval(), tmp_path / f"a.{suffix}"
    state = {prefix + k: t for k, t in trained.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    given = twin()
    assert se_inject.load(path, model=given) is given and len(se_inject.block_paths(given)) == 4
    assert torch.equal(out(given), out(trained))
    said = assert_unchanged_by(lambda: se_inject.load(path, model=fewer), fewer := twin(se_stages=(1,)))
    assert "12 unknown" in said  # fc1 and fc2 of three blocks


def test_base_weights_leave_the_blocks(tmp_path):
    plain, given = randomise(Wrapper("test_resnet")).eval(), Wrapper().eval()
    save_file(plain.state_dict(), tmp_path / "base.safetensors")
    se_inject.load(tmp_path / "base.safetensors", model=given)
    assert torch.equal(out(given), out(plain)) and len(se_inject.block_paths(given)) == 4


def test_a_file_whose_recipe_has_the_blocks_that_are_there(tmp_path):
    trained = injected()
    se_inject.save(trained, tmp_path / "full.safetensors")
    se_inject.save(trained, tmp_path / "se.safetensors", only="se")
    given = twin()
    assert torch.equal(out(se_inject.load(tmp_path / "full.safetensors", model=given)), out(trained))
    given = twin()
    given.load_state_dict({**given.state_dict(), **{k: t for k, t in trained.state_dict().items() if ".se." not in k}})
    assert torch.equal(out(se_inject.load(tmp_path / "se.safetensors", model=given)), out(trained))


@pytest.mark.parametrize("options, reason", [
    ({"se_ratio": 0.5}, "another shape"), ({"se_stages": (1,)}, "names 4 blocks, and Wrapper, in which"),
    ({"se_act_layer": "silu"}, "act_layer"), ({"se_init": "timm"}, "init"), ({"se_placement": "inner"}, "are in only one of")])
def test_a_file_whose_recipe_has_other_blocks_is_refused(options, reason, tmp_path):
    se_inject.save(injected(), tmp_path / "a.safetensors")
    given = twin(**options)
    assert reason in assert_unchanged_by(lambda: se_inject.load(tmp_path / "a.safetensors", model=given), given)


def test_the_file_of_the_inner_model_names_the_call_that_works(tmp_path):
    inner, given = randomise(timm.create_model("se_inject/test_resnet", num_classes=0)).eval(), twin()
    path = tmp_path / "inner.safetensors"
    se_inject.save(inner, path)
    said = assert_unchanged_by(lambda: se_inject.load(path, model=given), given)
    assert f"load({str(path)!r}, model=model.get_submodule('net'))" in said
    se_inject.load(path, model=given.get_submodule("net"))
    assert torch.equal(out(given.net), out(inner))


def test_a_wrapper_may_have_further_blocks_of_its_own(tmp_path):
    """Those that its recipe names go in beside those of the injected model, and a refused load takes out no others."""
    def further():
        return se_inject.inject(Wrapper(), input_size=(3, 64, 64))

    trained, path = randomise(further()).eval(), tmp_path / "further.safetensors"
    assert [p for p in se_inject.block_paths(trained) if not p.startswith("net.")] == ["se"]
    se_inject.save(trained, path)
    for given in (twin(), further().eval()):
        assert torch.equal(out(se_inject.load(path, model=given)), out(trained))
    other = Wrapper()
    other.branch.append(nn.Conv2d(other.net.num_features, other.net.num_features, 1))
    assert "missing" in assert_unchanged_by(lambda: se_inject.load(path, model=other), other.eval())
