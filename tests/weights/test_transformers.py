"""Injected models as transformers makes, saves and loads them: it draws what a file lacks, and blocks stay identities."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers of today needs another huggingface_hub than timm 1.0.15")
import torch
from safetensors.torch import load_file
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedModel,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
)

import se_inject
from se_inject import block_paths

from ..support.checks import randomise
from ..support.tiers import contract

X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")


def wrapper(name):
    return TimmWrapperConfig(architecture=name)


def backbone(name):
    return TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])


def detr(name):
    return DetrConfig(
        backbone_config=backbone(name), use_pretrained_backbone=False, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5)


CASES = [
    (TimmWrapperForImageClassification, wrapper, "test_resnet"), (TimmWrapperModel, wrapper, "test_efficientnet_ln"),
    (TimmBackbone, backbone, "test_convnext"), (DetrForObjectDetection, detr, "test_resnet"),
    *contract((TimmWrapperModel, wrapper, "test_resnet"), (TimmWrapperForImageClassification, wrapper, "test_convnext"),
              (TimmBackbone, backbone, "test_resnet"), (DetrForObjectDetection, detr, "test_convnext"))]


def outputs(model):
    with torch.no_grad():
        return [t for t in torch.utils._pytree.tree_leaves(tuple(model(X).values())) if isinstance(t, torch.Tensor)]


def assert_equal(mine, theirs):
    assert len(mine) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def lived_in(model):
    """`randomise`, also for the zeroed gains that DETR makes buffers of."""
    for key, t in randomise(model).named_buffers():
        if key.endswith("weight") and not t.any():
            t.fill_(0.5)
    return model.eval()


def from_pretrained(cls, *args, **kwargs):
    """`PreTrainedModel.from_pretrained`; that of `TimmBackbone` takes names alone, and models around it call this one.

    The tensors of a file are mapped to addresses for which some kernels round otherwise, so they are copied.
    """
    model, info = PreTrainedModel.from_pretrained.__func__(cls, *args, output_loading_info=True, **kwargs)
    for t in (*model.parameters(), *model.buffers()):
        t.data = t.data.clone()
    return model.eval(), info


@pytest.mark.parametrize("cls, config, name", CASES)
def test_blocks_are_identities_and_trained_blocks_come_back(cls, config, name, tmp_path):
    plain = lived_in(cls(config(name)))
    expected = outputs(plain)

    made = cls(config(f"se_inject/{name}")).eval()
    assert not made.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert_equal(outputs(made), expected)

    plain.save_pretrained(tmp_path / "base")
    model, info = from_pretrained(cls, tmp_path / "base", config=config(f"se_inject/{name}"))
    assert len(block_paths(model)) > 1 and not info["unexpected_keys"]
    assert info["missing_keys"] == {
        f"{path}.{key}" for path in block_paths(model) for key in model.get_submodule(path).state_dict()}
    assert_equal(outputs(model), expected)
    assert not any(m._forward_pre_hooks for path in block_paths(model) for m in model.get_submodule(path).modules())

    with torch.no_grad():
        for path in block_paths(model):
            for p in model.get_submodule(path).parameters():
                p.normal_()
    trained = outputs(model)
    assert not all(torch.equal(a, b) for a, b in zip(trained, expected))
    model.init_weights()  # transformers marks what it has drawn, and leaves it alone
    assert_equal(outputs(model), trained)
    model.save_pretrained(tmp_path / "trained")
    again, info = from_pretrained(cls, tmp_path / "trained")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(outputs(again), trained)


def test_a_file_may_lack_a_part_of_the_blocks(tmp_path):
    config = wrapper("se_inject/test_resnet")
    model = randomise(TimmWrapperModel(config)).eval()
    state = {k: t for k, t in model.state_dict().items() if "layer2.0.se." not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    again, info = from_pretrained(TimmWrapperModel, tmp_path)
    assert len(info["missing_keys"]) == 4
    se = again.timm_model.layer2[0].se
    assert torch.equal(again.timm_model.layer1[0].se.fc2.weight, model.timm_model.layer1[0].se.fc2.weight)
    assert se_inject.blocks.identity.is_identity(se) and se.fc1.weight.isfinite().all() and se.fc1.weight.any()


def vit():
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
        num_labels=3)).eval()


def test_a_folder_of_a_model_that_inject_has_changed(tmp_path):
    """transformers writes other names than the model's: vit.encoder.layer.0 for vit.layers.0."""
    x = torch.randn(2, 3, 32, 32)
    model = randomise(se_inject.inject(vit(), input_size=(3, 32, 32), ratio=0.25)).eval()
    model.save_pretrained(tmp_path / "a")
    assert "vit.encoder.layer.0.output.dense.weight" in load_file(tmp_path / "a" / "model.safetensors")
    assert not hasattr(model.config, "se_inject")  # the config may be that of other models, too
    expected = model(x).logits

    for path in (tmp_path / "a", tmp_path / "a" / "model.safetensors"):
        given = vit()
        assert se_inject.load(path, given) is given and len(block_paths(given)) == 4
        assert torch.equal(given(x).logits, expected)
    again = se_inject.load(tmp_path / "a", ViTForImageClassification.from_pretrained(tmp_path / "a"))  # leaves blocks out
    assert torch.equal(again(x).logits, expected)
    again.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert len(list((tmp_path / "b").glob("model-*"))) > 1
    for path in (tmp_path / "b", tmp_path / "b" / "model.safetensors", tmp_path / "b" / "model.safetensors.index.json"):
        assert torch.equal(se_inject.load(path, vit())(x).logits, expected)
    with pytest.raises(se_inject.SEInjectError, match="does not say its architecture"):
        se_inject.load(tmp_path / "a")
    with pytest.raises(se_inject.SEInjectError, match="has its own recipe"):
        se_inject.load(tmp_path / "a", vit(), ratio=0.5)
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 99'))
    for path in (tmp_path / "a", tmp_path / "a" / "model.safetensors"):
        with pytest.raises(se_inject.SEInjectError, match="recipe is of version 99"):
            se_inject.load(path, vit())


def test_a_folder_of_a_model_without_blocks(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    plain = randomise(vit()).eval()
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(se_inject.load(tmp_path / "plain", vit())(x).logits, plain(x).logits)

    model = se_inject.inject(vit(), input_size=(3, 32, 32))
    model.save_pretrained(tmp_path / "a")
    ViTForImageClassification.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "stale")
    given = vit()
    with pytest.raises(se_inject.SEInjectError, match="no weights of theirs"):
        se_inject.load(tmp_path / "stale", given)
    assert not block_paths(given)
    se_inject.eject(model).save_pretrained(tmp_path / "ejected")
    assert "se_inject" not in (tmp_path / "ejected" / "config.json").read_text()


def test_what_is_injected_into_a_model_of_transformers_is_not_drawn():
    model = TimmWrapperForImageClassification(wrapper("test_resnet")).eval()
    expected = outputs(model)
    se_inject.inject(model, input_size=(3, 96, 96))
    model.init_weights()
    assert_equal(outputs(model), expected)


def test_marks_of_transformers_do_not_make_an_owner_stale():
    model = TimmWrapperModel(wrapper("se_inject/test_vit"))
    assert not any("_se_stale" in vars(type(m)) for m in model.modules())
