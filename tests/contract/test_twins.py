"""timm's own models with attention are the injected bases: same keys, same weights, same outputs.

`pytest` runs a small one of each block, and `pytest -m contract` all of them.
"""

from __future__ import annotations

import pytest
import timm
import torch

import se_inject

from ..support.checks import randomise
from .census import census

# VoVNet's author left room in every block, and fills it in the last of each stage.
LAST_OF_STAGE_39 = {"se_exclude": ("stages.[23].blocks.0.attn",)}
LAST_OF_STAGE_57 = {"se_exclude": ("stages.2.blocks.[012].attn", "stages.3.blocks.[01].attn")}
# native, block, base, arguments of the base, options of the injection beside block and init; all at placement auto.
# Of the bases with a native's tensors, the one is named that computes the same.
TWINS = [
    ("cs3se_edgenet_x", "se", "cs3edgenet_x", {}, {"se_ratio": 0.25}),  # its author's ratio
    ("cs3sedarknet_l", "se", "cs3darknet_l", {}, {"se_ratio": 0.25}),  # its author's ratio
    ("cs3sedarknet_x", "se", "cs3darknet_x", {}, {}),
    ("efficientnet_b0", "se", "efficientnet_lite0", {"act_layer": "silu"}, {}),
    ("efficientnet_blur_b0", "se", "efficientnet_lite0", {"act_layer": "silu", "aa_layer": "blurpc"}, {}),
    ("tf_efficientnet_b0", "se", "tf_efficientnet_lite0", {"act_layer": "silu"}, {}),
    ("eca_resnet33ts", "eca", "resnet33ts", {}, {}),
    ("eca_resnext26ts", "eca", "resnext26ts", {}, {}),
    ("eca_vovnet39b", "eca", "vovnet39a", {"residual": True}, LAST_OF_STAGE_39),
    ("ecaresnet26t", "eca", "resnet26t", {}, {}),
    ("ecaresnet50d", "eca", "resnet50d", {}, {}),
    ("ecaresnet50t", "eca", "resnet50t", {}, {}),
    ("ecaresnet101d", "eca", "resnet101d", {}, {}),
    ("ecaresnet200d", "eca", "resnet200d", {}, {}),
    ("ese_vovnet39b", "ese", "vovnet39a", {"residual": True}, LAST_OF_STAGE_39),
    ("ese_vovnet57b", "ese", "vovnet57a", {"residual": True}, LAST_OF_STAGE_57),
    ("gcresnet33ts", "gca", "resnet33ts", {}, {}),
    ("gcresnext26ts", "gca", "resnext26ts", {}, {}),
    ("nf_ecaresnet26", "eca", "nf_resnet26", {}, {}),
    ("nf_ecaresnet50", "eca", "nf_resnet50", {}, {}),
    ("nf_ecaresnet101", "eca", "nf_resnet101", {}, {}),
    ("nf_seresnet26", "se", "nf_resnet26", {}, {}),
    ("nf_seresnet50", "se", "nf_resnet50", {}, {}),
    ("nf_seresnet101", "se", "nf_resnet101", {}, {}),
    ("regnety_002", "se", "regnetx_002", {}, {}),
    ("regnety_120", "se", "regnetx_120", {}, {}),
    ("sedarknet21", "se", "darknet21", {}, {}),
    ("seresnet18", "se", "resnet18", {}, {}),
    ("seresnet33ts", "se", "resnet33ts", {}, {}),
    ("seresnet34", "se", "resnet34", {}, {}),
    ("seresnet50", "se", "resnet50", {}, {}),
    ("seresnet50t", "se", "resnet50t", {}, {}),
    ("seresnet101", "se", "resnet101", {}, {}),
    ("seresnet152", "se", "resnet152", {}, {}),
    ("seresnet152d", "se", "resnet152d", {}, {}),
    ("seresnet200d", "se", "resnet200d", {}, {}),
    ("seresnetaa50d", "se", "resnetaa50d", {}, {}),
    ("seresnext26ts", "se", "resnext26ts", {}, {}),
    ("seresnext50_32x4d", "se", "resnext50_32x4d", {}, {}),
    ("seresnext101_32x4d", "se", "resnext101_32x4d", {}, {}),
    ("seresnext101_32x8d", "se", "resnext101_32x8d", {}, {}),
    ("seresnext101_64x4d", "se", "resnext101_64x4d", {}, {}),
]
# small ones, of each block and of each module of timm's that has one
QUICK = {
    "seresnet18", "ecaresnet26t", "nf_seresnet26", "regnety_002", "efficientnet_b0", "seresnext26ts", "eca_resnext26ts",
    "gcresnext26ts", "sedarknet21", "ese_vovnet39b"}


@pytest.mark.contract
def test_every_twin_is_listed():
    found = census()
    assert {(native, block) for native, (block, _) in found.items()} == {(t[0], t[1]) for t in TWINS}
    assert all(base in found[native][1] for native, _, base, _, _ in TWINS)


@pytest.mark.parametrize("native, block, base, args, options", [
    pytest.param(*twin, id=twin[0], marks=[] if twin[0] in QUICK else pytest.mark.contract) for twin in TWINS])
def test_native_weights_load_strictly(native, block, base, args, options):
    theirs = randomise(timm.create_model(native)).eval()
    ours = timm.create_model(f"se_inject/{base}", se_init="timm", se_block=block, **args, **options).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    ours.train()
    theirs.train()
    torch.manual_seed(1)
    with torch.no_grad():
        expected = theirs(x)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(ours(x), expected)


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
