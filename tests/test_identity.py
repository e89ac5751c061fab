"""Injected models are their bases, bit for bit, until they are trained: twenty families."""

import pytest
import timm

import se_inject

from .util import check_identity

MODELS = {
    "resnet18": 64, "tf_efficientnet_lite0": 64, "vit_tiny_patch16_224": 224, "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 224, "mixer_s32_224": 224, "nf_resnet26": 64, "densenet121": 64, "vgg11": 64,
    "inception_v3": 128, "dpn48b": 64, "rexnet_100": 64, "res2net50_26w_4s": 64, "regnetx_002": 64, "xcit_nano_12_p16_224": 224,
    "coatnet_pico_rw_224": 224, "edgenext_xx_small": 64, "hrnet_w18_small": 64, "ghostnet_050": 64, "mobileone_s0": 64,
    "vovnet39a": 64, "dla34": 64, "cspdarknet53": 64, "poolformer_s12": 64, "levit_128s": 224,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_identity(name):
    check_identity(timm.create_model(name), (3, MODELS[name], MODELS[name]))


# no shortcut to gate
NO_PLACE = {("vgg11", "identity")}


@pytest.mark.parametrize("placement", ["standard", "inner", "pre", "post", "identity"])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vgg11"])
def test_identity_at_every_placement(name, placement):
    model = timm.create_model(name)
    if (name, placement) in NO_PLACE:
        with pytest.raises(se_inject.NoSitesError, match="placement"):
            se_inject.inject(model, placement=placement)
        return
    check_identity(model, (3, 64, 64), placement=placement)
