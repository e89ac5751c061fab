"""timm's own SE models are the injected bases: same keys, same weights, same outputs."""

import pytest
import timm
import torch

import se_inject

from .util import randomise

# native, base, arguments of the base, options of the injection; every pair of timm's whose state dicts
# agree without SE. Of the bases with a native's keys, the one is named that computes the same.
TWINS = [
    ("cs3se_edgenet_x", "cs3edgenet_x", {}, {"se_ratio": 0.25}),  # its author's ratio
    ("cs3sedarknet_l", "cs3darknet_l", {}, {"se_ratio": 0.25}),  # its author's ratio
    ("cs3sedarknet_x", "cs3darknet_x", {}, {}),
    ("efficientnet_b0", "efficientnet_lite0", {"act_layer": "silu"}, {}),
    ("tf_efficientnet_b0", "tf_efficientnet_lite0", {"act_layer": "silu"}, {}),
    ("nf_seresnet26", "nf_resnet26", {}, {}),
    ("nf_seresnet50", "nf_resnet50", {}, {}),
    ("nf_seresnet101", "nf_resnet101", {}, {}),
    ("regnety_002", "regnetx_002", {}, {}),
    ("regnety_120", "regnetx_120", {}, {}),
    ("sedarknet21", "darknet21", {}, {}),
    ("seresnet18", "resnet18", {}, {}),
    ("seresnet33ts", "resnet33ts", {}, {}),
    ("seresnet34", "resnet34", {}, {}),
    ("seresnet50", "resnet50", {}, {}),
    ("seresnet50t", "resnet50t", {}, {}),
    ("seresnet101", "resnet101", {}, {}),
    ("seresnet152", "resnet152", {}, {}),
    ("seresnet152d", "resnet152d", {}, {}),
    ("seresnet200d", "resnet200d", {}, {}),
    ("seresnetaa50d", "resnetaa50d", {}, {}),
    ("seresnext26ts", "resnext26ts", {}, {}),
    ("seresnext50_32x4d", "resnext50_32x4d", {}, {}),
    ("seresnext101_32x4d", "resnext101_32x4d", {}, {}),
    ("seresnext101_32x8d", "resnext101_32x8d", {}, {}),
    ("seresnext101_64x4d", "resnext101_64x4d", {}, {}),
]


@pytest.mark.parametrize("native, base, args, options", TWINS, ids=[t[0] for t in TWINS])
def test_native_weights_load_strictly(native, base, args, options):
    theirs = randomise(timm.create_model(native)).eval()
    ours = timm.create_model(f"se_inject/{base}", se_init="timm", **args, **options).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    ours.train()
    theirs.train()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_gain_folds_away_exactly():
    """2 * sigmoid at identity is a plain sigmoid with the norm before it doubled and fc1 halved."""
    ours = randomise(timm.create_model("resnet18"))
    se_inject.inject(ours)
    for name, p in ours.named_parameters():
        if ".se." in name:
            p.data.add_(torch.randn_like(p) * 0.1)
    theirs = timm.create_model("seresnet18").eval()
    folded = {k: t.clone() for k, t in ours.state_dict().items()}
    for key in folded:
        if key.endswith(("bn2.weight", "bn2.bias")):
            folded[key] *= 2
        if key.endswith("se.fc1.weight"):
            folded[key] /= 2
    theirs.load_state_dict(folded, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs(x))
