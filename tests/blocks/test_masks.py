"""Padding: a token that a mask leaves out for all others changes none of them."""

import copy
import inspect

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.blocks.masks import MASKS, unpadded
from se_inject.errors import SEInjectError
from se_inject.surgery.edits import call_with_masks
from tests.support.toys import needs

from ..support.versions import needs_masks


def block(kind: str = "se") -> nn.Module:
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(16, 16), nn.GELU())

        def forward(self, x):
            return x + self.fc(x)

    stem = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(2))
    model = nn.Sequential(stem, nn.Sequential(Transposed(), Owner()))
    se_inject.inject(model, block=kind, init="timm", input_size=(3, 4, 4))
    return model[1][1].se.eval()


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def masks(real: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Masks for which the tokens in `real`, (N, L), count: by the name of the argument, in each form that it has."""
    n, tokens = real.shape
    added = torch.zeros(real.shape).masked_fill(~real, float("-inf"))
    lowest = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)
    square = (real[:, None, :, None] & real[:, None, None, :]).expand(n, 2, tokens, tokens)
    keys = [real[:, None].expand(n, tokens, tokens), *(m[:, None, None] for m in (real, added, lowest))]
    attention = [*keys, square]
    return {
        "attn_mask": attention, "attention_mask": [*attention, real, real.long()],
        "key_padding_mask": [~real, added], "src_key_padding_mask": [~real, added],
    }


REAL = torch.arange(9) < torch.tensor([[9], [6], [1]])


@pytest.mark.parametrize("kind", ["se", "film", "ese", "eca", "ecam", "ceca", "ge"])
@pytest.mark.parametrize("name", ["attn_mask", "attention_mask", "key_padding_mask", "src_key_padding_mask"])
@torch.no_grad()
def test_padding_changes_no_other_token_and_stays(kind, name):
    gate, x = block(kind), torch.randn(3, 9, 16)
    for mask in masks(REAL)[name]:
        y = call_with_masks(gate, x, **{name: mask})
        for image, length in enumerate((9, 6, 1)):
            alone = gate(x[image:image + 1, :length])
            assert torch.allclose(y[image:image + 1, :length], alone, atol=1e-6), mask.shape
            assert torch.equal(y[image, length:], x[image, length:])


@torch.no_grad()
def test_masks_that_hide_no_token_change_nothing():
    """A causal mask, and a shift of windows: each token is seen by another."""
    gate, x = block(), torch.randn(2, 6, 16)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(call_with_masks(gate, x, attn_mask=causal), gate(x))
    windows = torch.zeros(2, 6, 6).masked_fill(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) == 0, -100.0)
    assert torch.equal(call_with_masks(gate, x, attn_mask=windows, key_padding_mask=None), gate(x))
    maps = torch.randn(2, 4, 4, 16)
    assert torch.equal(call_with_masks(nn.Identity(), maps, attn_mask=causal), maps)


@pytest.mark.parametrize(("given", "text"), [
    ({"attn_mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)}, "attn_mask of shape (2, 1, 1, 5)"),
    ({"attention_mask": torch.ones(2, 6)}, "attention_mask of shape (2, 6) and torch.float32"),
    ({"attn_mask": torch.ones(4, 6, 6, dtype=torch.bool)}, "attn_mask of shape (4, 6, 6)"),
])  # fmt: skip
def test_a_mask_of_unknown_form_is_an_error(given, text):
    with pytest.raises(SEInjectError) as error:
        call_with_masks(block(), torch.randn(2, 6, 16), **given)
    assert text in str(error.value) and "give (N, 1, 1, L)" in str(error.value)


@pytest.mark.parametrize("kind", ["gc", "gca"])
def test_a_block_that_weighs_positions_takes_no_padding(kind):
    with pytest.raises(SEInjectError, match="inject another block"):
        call_with_masks(block(kind), torch.randn(3, 9, 16), attn_mask=REAL[:, None, None])


@torch.no_grad()
def test_padding_of_naflexvit_changes_no_output():
    needs("naflexvit_base_patch16_gap")
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=64, num_heads=2, depth=3, num_classes=5).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    plain = copy.deepcopy(model)
    se_inject.inject(model)
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
    image = {"patches": torch.rand(2, 16, 768), "patch_coord": at, "patch_valid": torch.ones(2, 16, dtype=torch.bool)}
    noise = {"patches": torch.randn(2, 48, 768), "patch_coord": torch.zeros(2, 48, 2, dtype=torch.long),
             "patch_valid": torch.zeros(2, 48, dtype=torch.bool)}
    padded = {key: torch.cat([value, noise[key]], 1) for key, value in image.items()}
    assert torch.equal(model(padded), plain(padded)) and torch.equal(model(image), plain(image))
    for p in se_inject.se_parameters(model):
        nn.init.normal_(p, std=0.5)
    assert not torch.allclose(model(image), plain(image), atol=1e-2)
    assert torch.allclose(model(padded), model(image), atol=1e-5)


def test_a_block_that_would_not_get_the_mask_is_skipped():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.scale * self.fc(x)

    class Inner(Mlp):
        def forward(self, x):
            return x + self.fc(x)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mlp = Inner(), Mlp()

        def forward(self, x, attn_mask=None):
            x = self.inner(x)
            return x + self.mlp(x)

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(2), Transposed()), Layer())
    plan = se_inject.plan(model, input_size=(3, 4, 4))
    assert [s.owner for s in plan.sites] == ["1"]  # and not in the Mlp, before its scale
    (site,) = plan.skipped
    assert site.owner == "1.inner" and site.reason == "1.forward takes attn_mask, which the block would not get"


@torch.no_grad()
def test_padding_in_a_forward_that_branches_on_sizes():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(16, 16), nn.GELU())

        def forward(self, x, attn_mask=None):
            return x + self.fc(x) if x.shape[1] % 2 == 0 else x - 2 * self.fc(x)

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(2), Transposed()), Layer())
    se_inject.inject(model, input_size=(3, 4, 4), init="timm")
    for length in (6, 5):  # the branches of even and of odd lengths
        x = torch.randn(1, length + 4, 16)
        real = (torch.arange(length + 4) < length)[None]
        padded = model[1](x, attn_mask=real[:, None, None])
        assert torch.allclose(padded[:, :length], model[1](x[:, :length]), atol=1e-6)
        assert not torch.allclose(padded[:, :length], model[1](x)[:, :length])


@torch.no_grad()
@needs_masks
def test_a_trace_by_fx_holds_for_calls_with_and_without_masks():
    layer = se_inject.inject(timm.create_model("test_vit"), init="timm").eval().blocks[0]
    x = torch.randn(2, 9, 64)
    for traced in (torch.fx.symbolic_trace(layer), copy.deepcopy(torch.fx.symbolic_trace(layer))):
        for mask in (None, REAL[:2, None, None]):
            assert torch.equal(traced(x, mask, False), layer(x, mask, False))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning", "ignore:.*TorchScript type system")
@torch.no_grad()
def test_a_trace_by_fx_is_scripted_for_calls_without_masks():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(16, 16), nn.GELU())

        def forward(self, x, attn_mask: torch.Tensor | None = None):
            return x + self.fc(x)

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(2), Transposed()), Layer())
    layer = se_inject.inject(model, input_size=(3, 4, 4), init="timm")[1]
    scripted, x = torch.jit.script(torch.fx.symbolic_trace(layer)), torch.randn(2, 9, 16)
    assert torch.equal(scripted(x), layer(x))
    with pytest.raises(torch.jit.Error, match="leaves out no padding"):
        scripted(x, REAL[:2, None, None])


def test_every_mask_is_an_argument():
    assert list(inspect.signature(unpadded).parameters)[2:] == list(MASKS)
