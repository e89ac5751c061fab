"""The parameters of the blocks, a frozen base, and an optimizer that was created before the injection."""

import copy
import io
import logging
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

import se_inject
from se_inject import block_paths, input_sizes

from ..support.checks import randomise
from ..support.versions import needs_model

# BatchNorm, EvoNorm, BatchNorm in the head, LayerNorm, buffers in attention
NAMES = [
    "test_resnet", "resnetv2_50d_evos", "levit_128s", "test_vit", needs_model("test_coatnet"), "mobilenetv3_small_050"]


def small(name, **kwargs):
    kwargs = {"num_classes": 5, **kwargs}
    return se_inject.inject(randomise(timm.create_model(name, **kwargs)))


def images(model):
    c, h, w = input_sizes(model)[0]
    side = (h, w) if hasattr(model, "patch_embed") or h < 64 else (64, 64)
    return torch.randn(2, c, *(side if not type(model).__name__.startswith(("Max", "Levit")) else (h, w)))


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def split(model, head=()):
    """All tensors of the blocks, of the head, and of the rest, also the tensors that no state dict holds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    blocks = {k for k in tensors if k.startswith(tuple(f"{p}." for p in block_paths(model)))}
    heads = {k for k in tensors if k.startswith(tuple(f"{p}." for p in head))} if head else set()
    return tuple(
        {k: tensors[k].detach().clone() for k in keys} for keys in (blocks, heads, tensors.keys() - blocks - heads))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_base_does_not_move(name, head):
    model = small(name)
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    modes = {k: m.training for k, m in model.named_modules()}
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    assert se_inject.freeze_base(model, head=head) is model
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    heads = [n for n, m in model.named_modules() if m in classifiers] if head else []
    model.eval()
    model.train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.5, weight_decay=0.1)
    before = split(model, heads)
    step(model, optimizer, images(model))
    after = split(model, heads)
    assert after[0].keys() == before[0].keys()
    assert any(not torch.equal(after[0][k], before[0][k]) for k in before[0])
    assert all(not torch.equal(after[1][k], before[1][k]) for k in before[1] if k.endswith(".weight"))
    assert [k for k in before[2] if not torch.equal(after[2][k], before[2][k])] == []
    assert bool(before[1]) is head
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes

    assert se_inject.unfreeze_base(model) is model
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert {k: m.training for k, m in model.named_modules()} == modes
    assert "train" not in model.__dict__ and "_se_frozen" not in model.__dict__


def test_dropout_goes_on_and_statistics_do_not():
    model = small("test_resnet", drop_rate=0.5, drop_path_rate=0.5)
    se_inject.freeze_base(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and model.training
    assert all(m.training for m in model.modules() if m not in norms)
    assert model.eval() is model and not any(m.training for m in model.modules())
    se_inject.unfreeze_base(model)
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())


def test_what_was_fixed_stays_fixed():
    model = small("test_resnet")
    model.layer1[0].conv1.weight.requires_grad_(False)
    se_inject.freeze_base(model, head=False)
    se_inject.freeze_base(model)  # another choice of head
    assert model.fc.weight.requires_grad
    se_inject.unfreeze_base(model)
    assert [k for k, p in model.named_parameters() if not p.requires_grad] == ["layer1.0.conv1.weight"]
    assert se_inject.unfreeze_base(model) is model


def test_a_frozen_model_lives_on(tmp_path):
    model = se_inject.freeze_base(small("test_resnet"))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        twin.eval()
        twin.train()
        assert model.training and twin.training and not twin.bn1.training
        assert se_inject.unfreeze_base(twin).bn1.training and not model.bn1.training
    synced = convert_sync_batchnorm(copy.deepcopy(model)).train()
    assert not synced.bn1.training
    wrapped = nn.DataParallel(model)
    wrapped.eval()
    wrapped.train()
    assert not model.bn1.training and model.layer1.training
    x = images(model)
    expected = model.eval()(x)
    se_inject.save(model, tmp_path / "m.safetensors")
    assert torch.equal(se_inject.load(tmp_path / "m.safetensors")(x), expected)
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    se_inject.load(tmp_path / "se.safetensors", model)
    assert torch.equal(model(x), expected)


def test_eject_frees_the_base():
    plain = timm.create_model("test_resnet")
    model = se_inject.freeze_base(se_inject.inject(copy.deepcopy(plain)))
    se_inject.eject(model)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert model.__dict__.keys() == plain.__dict__.keys()
    inner = se_inject.freeze_base(se_inject.inject(model))
    se_inject.eject(nn.Sequential(inner))
    assert all(p.requires_grad for p in inner.parameters()) and inner.__dict__.keys() == plain.__dict__.keys()


def test_a_head_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = timm.create_model("test_resnet", num_classes=0), nn.Linear(96, 2)

        def forward(self, x):
            return self.fc(self.body(x))

    model = Net()
    model.fc = nn.Linear(model.body.num_features, 2)
    se_inject.inject(model, input_size=(3, 64, 64))
    with pytest.raises(se_inject.SEInjectError, match=r"head=model\.fc"):
        se_inject.freeze_base(model)
    for head in (nn.Linear(1, 1), None, [], (None,)):
        with pytest.raises(se_inject.SEInjectError, match="not a module inside"):
            se_inject.freeze_base(model, head=head)
    assert all(p.requires_grad for p in model.parameters()) and "_se_frozen" not in model.__dict__
    se_inject.freeze_base(model, head=model.fc)
    free = {k for k, p in model.named_parameters() if p.requires_grad}
    assert free == {k for k in model.state_dict() if k.startswith("fc.") or ".se" in k or ".attn" in k}


def test_se_parameters():
    model = small("test_resnet")
    mine = se_inject.se_parameters(model)
    assert mine and {id(p) for p in mine} == {
        id(p) for k, p in model.named_parameters() if k.startswith(tuple(f"{p}." for p in block_paths(model)))}
    assert se_inject.se_parameters(nn.DataParallel(model)) == mine
    assert se_inject.se_parameters(torch.compile(model)) == mine
    decay = param_groups_weight_decay(se_inject.freeze_base(model, head=False), weight_decay=0.1)
    assert {id(p) for g in decay for p in g["params"]} == {id(p) for p in mine}
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in decay for p in g["params"])


def test_an_optimizer_that_was_there_before(caplog):
    model = timm.create_model("test_resnet", num_classes=5)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    step(model, optimizer, torch.randn(2, 3, 64, 64))
    with caplog.at_level(logging.WARNING, "se_inject"):  # there are gradients: it is being trained
        se_inject.inject(model)
    assert "add_param_group" in caplog.text
    missing = se_inject.se_parameters(model, optimizer)
    assert missing == se_inject.se_parameters(model)
    optimizer.add_param_group({"params": missing, "lr": 1e-2, "weight_decay": 0.0})
    assert se_inject.se_parameters(model, optimizer) == []
    groups = len(optimizer.param_groups)
    scheduler = CosineLRScheduler(optimizer, t_initial=4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    scheduler.step(2)
    assert len(scheduler.base_values) == groups and optimizer.param_groups[-1]["lr"] < 1e-2
    before = [p.detach().clone() for p in missing]
    for _ in range(2):  # the first layer of an identity block gets a gradient when the last layer is no longer zero
        step(model, optimizer, torch.randn(2, 3, 64, 64))
    assert all(not torch.equal(a, b) for a, b in zip(before, missing, strict=True))


@pytest.mark.parametrize("call, message", [
    (lambda m: se_inject.se_parameters(m), "no injected blocks; inject"),
    (lambda m: se_inject.freeze_base(m), "no injected blocks; inject"),
    (lambda m: se_inject.se_parameters("resnet18"), "needs a model"),
    (lambda m: se_inject.freeze_base(None), "needs a model"),
    (lambda m: se_inject.unfreeze_base({}), "needs a model"),
    (lambda m: se_inject.se_parameters(m, "adamw"), "expected a torch.optim.Optimizer"),
])  # fmt: skip
def test_what_cannot_be_asked(call, message):
    model = timm.create_model("test_resnet")
    with pytest.raises(se_inject.SEInjectError, match=message):
        call(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kept", [False, True])
def test_a_fold_of_a_frozen_model_gives_back_what_it_held(kept):
    """`fold` runs the model in eval mode for a while; without blocks, the base is frozen no more."""
    model = se_inject.inject(timm.create_model("test_resnet"), input_size=(3, 64, 64))
    se_inject.freeze_base(randomise(model) if kept else model)
    report = se_inject.fold(model, [torch.randn(2, 3, 64, 64)], max_variation=0)
    assert model.training and len(report.kept) == 4 * kept and model.bn1.training is not kept
    assert se_inject.unfreeze_base(model).bn1.training


@pytest.mark.parametrize("averaged", [False, True])
def test_averaging_of_weights_leaves_the_statistics(averaged):
    model = small("test_resnet")
    randomise(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.num_batches_tracked.fill_(7)
    head = nn.Sequential(nn.BatchNorm1d(model.fc.in_features), model.fc)
    model.fc = head
    se_inject.freeze_base(model.eval(), head=head)
    model = torch.optim.swa_utils.AveragedModel(model) if averaged else model
    before = {k: t.clone() for k, t in model.named_buffers() if ".fc." not in f".{k}" and k != "n_averaged"}
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 32, 32) for _ in range(2)], model.train())
    buffers = dict(model.named_buffers())
    assert before and all(torch.equal(buffers[k], t) for k, t in before.items())
    own = model.module if averaged else model
    assert own.fc[0].num_batches_tracked == 2  # the head learns
    se_inject.unfreeze_base(own)
    assert not any("reset_running_stats" in m.__dict__ for m in own.modules())
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 32, 32)], own)
    assert not any(torch.equal(buffers[k], t) for k, t in before.items())


def test_the_page_puts_the_blocks_into_the_last_group_of_fastai():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    code = page.partition("def splitter")[2].partition("\n\nlearn =")[0]
    names = {"se_inject": se_inject}
    exec(f"def splitter{code}", names)
    model = small("test_resnet")
    body, last = ([*map(id, group)] for group in names["splitter"](model))
    assert {*last} == {id(p) for p in (*se_inject.se_parameters(model), *model.fc.parameters())}
    assert sorted(body + last) == sorted(map(id, model.parameters()))
