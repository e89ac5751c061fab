"""What learns, by part; and the norms of a frozen base, which may learn without their statistics."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerNormAct2d
from torch import nn

import se_inject
from se_inject.dataflow.layers import is_norm
from se_inject.surgery.trainable import Count

from ..support.checks import randomise


def counts(parameters):
    parameters = list(parameters)
    n = sum(p.numel() for p in parameters)
    return Count(len(parameters), n, len(parameters), n)


def none_of(c):
    return Count(0, 0, c.of_tensors, c.of_numbers)


def parts(model):
    """The expected counts of a test_resnet, from its own modules."""
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    convs = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and ".se." not in name]
    return counts(se_inject.se_parameters(model)), counts(norms), counts(model.fc.parameters()), counts(convs)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_what_learns_is_counted_by_part(head, norms):
    model = timm.create_model("se_inject/test_resnet", num_classes=5)
    blocks, of_norms, of_head, base = parts(model)
    every = se_inject.trainable(model)
    assert (every.blocks, every.norms, every.head, every.base) == (blocks, of_norms, of_head, base)
    assert every.total == counts(model.parameters())
    report = se_inject.trainable(se_inject.freeze_base(model, head=head, norms=norms))
    assert report.blocks == blocks and report.base == none_of(base)
    assert report.norms == (of_norms if norms else none_of(of_norms))
    assert report.head == (of_head if head else none_of(of_head))
    learning = [p for p in model.parameters() if p.requires_grad]
    assert (report.total.tensors, report.total.numbers) == (len(learning), sum(p.numel() for p in learning))
    assert se_inject.trainable(se_inject.unfreeze_base(model)) == every


def test_any_module_is_counted():
    shared = nn.Linear(2, 2)
    report = se_inject.trainable(nn.Sequential(shared, nn.LayerNorm(2), shared, nn.LazyLinear(3)))
    assert report.base == Count(4, 6, 4, 6) and report.norms == Count(2, 4, 2, 4)
    assert report.blocks == report.head == Count()
    plain = timm.create_model("test_resnet")
    assert se_inject.trainable(plain).blocks == Count() and se_inject.trainable(plain).head.tensors == 2
    wrapped = se_inject.trainable(nn.DataParallel(timm.create_model("se_inject/test_resnet")))
    assert wrapped.blocks == se_inject.trainable(timm.create_model("se_inject/test_resnet")).blocks != Count()
    with pytest.raises(se_inject.SEInjectError, match="needs a model"):
        se_inject.trainable("resnet18")


def test_norms_are_known_by_their_class():
    class BN(nn.BatchNorm2d):
        pass

    class NormLinear(nn.Linear):
        pass

    class NormFree(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.conv = nn.Parameter(torch.ones(())), nn.Conv2d(1, 1, 1)

    yes = [nn.LayerNorm((2, 3, 4)), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, affine=True), nn.RMSNorm(2), BN(2), LayerNorm2d(2),
           BatchNormAct2d(2, act_layer=nn.PReLU), LayerNormAct2d(2), nn.SyncBatchNorm(2)]
    no = [nn.Linear(2, 2), NormLinear(2, 2), NormFree(), nn.PReLU(), nn.Sequential(nn.LayerNorm(2)),
          nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))]
    assert all(map(is_norm, yes)) and not any(map(is_norm, no))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_norms_learn_and_their_statistics_stay(name):
    model = randomise(timm.create_model(f"se_inject/{name}", num_classes=5, **({"img_size": 64} if "vit" in name else {})))
    se_inject.freeze_base(model, norms=True).train()
    norms = {f"{path}.{key}" for path, m in model.named_modules() if is_norm(m) for key, _ in m.named_parameters()}
    assert norms and not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    moved = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    others = {k for k in moved if not any(f".{slot}" in k for slot in ("se.", "se1.", "se2.")) and k.partition(".")[0] not in (
        "fc", "head", "classifier")}
    assert others and others <= norms and len(others) > len(norms) / 2


def test_norms_that_are_not_there_are_refused():
    model = se_inject.inject(timm.create_model("nf_resnet26"))
    for norms, message in ((True, "have no parameters"), ("all", "expected True or False")):
        with pytest.raises(se_inject.SEInjectError, match=message):
            se_inject.freeze_base(model, norms=norms)
    assert all(p.requires_grad for p in model.parameters()) and "_se_frozen" not in model.__dict__
