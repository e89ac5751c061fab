"""Injected models are their bases, bit for bit, until they are trained.

`pytest` runs a small model of each of eighteen families, and `pytest -m contract` the smallest model of every family of timm
and torchvision, at full width.
"""

from __future__ import annotations

import math
import pathlib
from collections import defaultdict

import pytest
import timm

import se_inject
from se_inject.tools import zoo, zoo_table

from ..support.checks import check_identity
from ..support.families import FAMILIES as SMALL
from ..support.families import plain
from ..support.tiers import contract

TABLE = zoo_table.read(pathlib.Path(__file__).parents[2] / "docs" / "zoo.csv")


def smallest_of_each_family(torchvision: bool) -> list[str]:
    families = defaultdict(list)
    for row in TABLE:
        if row.model.startswith(zoo.TORCHVISION) == torchvision:
            families[row.family].append(row)
    injected = [[r for r in group if r.status == "injected"] or group for _, group in sorted(families.items())]
    return [min(group, key=lambda r: r.params).model for group in injected]


FAMILIES = smallest_of_each_family(torchvision=False)
TORCHVISION = smallest_of_each_family(torchvision=True)
REFUSED = {row.model for row in TABLE if row.status == "refused"}


# the auxiliary head, which runs in train mode alone, needs a larger map
SIZES = {"torchvision/inception_v3": (3, 299, 299)}

# the two largest of these, with four of their blocks: at full depth they take a minute and a half
FEWER = {name: {"depth": 4} for name in ("deepseek_vit_412m", "gemma4_vit_167m")}


def smallest_size(name, model, **options):
    """The smallest input on which every block sees more than one position: on one, a squeeze does nothing."""
    channels, height, width = SIZES.get(name) or zoo.smallest_input(model)
    for times in (1, 2, 4):
        size = (channels, times * height, times * width)
        plan = se_inject.plan(model, input_size=size, **options)
        if all(math.prod(s.size) > 1 for s in plan.sites):
            return size
    raise AssertionError(f"{name} has blocks at one position")


@pytest.mark.parametrize("family", SMALL, ids=lambda f: f.name)
def test_identity_of_small_models(family):
    check_identity(plain(family), (3, family.side, family.side))


@pytest.mark.contract
@pytest.mark.parametrize("name", FAMILIES + TORCHVISION)
def test_identity(name):
    model = timm.create_model(name, **FEWER[name]) if name in FEWER else zoo.create(name)
    options = {"existing": "stack"} if name in REFUSED else {}
    check_identity(model, smallest_size(name, model, **options), **options)


def test_every_family_is_there():
    for models, pattern in ((FAMILIES, "*"), (TORCHVISION, "torchvision/*")):
        assert {zoo.family(n) for n in models} == {zoo.family(n) for n in zoo.names(pattern)}


@pytest.mark.parametrize("placement", ["standard", "inner", "pre", "post", "identity"])
@pytest.mark.parametrize("name", [
    "test_resnet", "mobilenetv2_035", "test_convnext", "vgg11",
    *contract("resnet18", "tf_efficientnet_lite0", "convnext_atto")])
def test_identity_at_every_placement(name, placement):
    model = timm.create_model(name, **({"mlp_ratio": 0.02} if name == "vgg11" else {}))
    if (name, placement) == ("vgg11", "identity"):  # no shortcut to gate
        with pytest.raises(se_inject.NoSitesError, match="placement"):
            se_inject.inject(model, placement=placement)
        return
    check_identity(model, (3, 64, 64), placement=placement)
