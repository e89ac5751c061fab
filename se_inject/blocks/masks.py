"""Blocks on padded sequences: a token that no other may attend to is padding, and is left out of the squeeze."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import SEInjectError

# The arguments by which the field's layers take a mask of attention or of padding, and what marks a token to leave out:
# False in `attn_mask` (timm, `scaled_dot_product_attention`) and `attention_mask` (transformers), True in torch's own layers.
# In floats, the mask is added to the attention's logits.
MASKS = {"attn_mask": False, "attention_mask": False, "key_padding_mask": True, "src_key_padding_mask": True}
WEIGHS = "_se_weighs"  # attribute of a block whose squeeze is more than means and maxima over positions


def call_masked(block: nn.Module, x: torch.Tensor, **masks: torch.Tensor | None) -> torch.Tensor:
    """Call a block on tokens of which some are padding. These stay as they are and change no other token.

    For the block they are the mean of the other tokens, so that means and maxima over all tokens are those of the others.

    Args:
        block: A block.
        x: (N, L, C). Maps have no padding: the block is called as without masks.
        masks: The masks that the owner's forward was called with, by name; some are not None.

    Raises:
        SEInjectError: A mask does not say which tokens are padding, or the block weighs the positions.
    """
    if x.dim() != 3:
        y: torch.Tensor = block(x)
        return y
    if WEIGHS in block.__dict__:
        raise SEInjectError(
            "an injected block weighs the tokens that it squeezes, so padding would count: inject another block, such as "
            f"block='se', or call the model without {' and '.join(masks)}")
    real = torch.ones(1, x.shape[1], 1, dtype=torch.bool, device=x.device)
    for name, mask in masks.items():
        if mask is not None:
            real = real & ~_padding(name, mask, x).unsqueeze(-1)
    total = torch.where(real, x, 0).sum(1, keepdim=True, dtype=torch.float32 if x.dtype.itemsize < 4 else None)
    mean = total / real.sum(1, keepdim=True).clamp(min=1)
    return torch.where(real, block(torch.where(real, x, mean.to(x.dtype))), x)


def _padding(name: str, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The tokens that a mask leaves out for all queries: (N, L), or (1, L) for all images alike."""
    images, tokens = x.shape[:2]
    numbers = mask.is_floating_point()
    of_tokens = mask.dim() == 2 and name != "attn_mask"
    known = mask.dim() in (2, 3, 4) and mask.shape[-1] == tokens and (
        (mask.dim() == 2 and not of_tokens) or mask.shape[0] in (1, images)) and not (numbers and of_tokens and not MASKS[name])
    if not known:
        raise SEInjectError(
            f"{name} of shape {tuple(mask.shape)} and {mask.dtype} does not say which of {tokens} tokens are padding, which a "
            "block has to leave out: give (N, 1, 1, L) or (N, 1, L, L), boolean or added to the logits")
    out = mask <= torch.finfo(mask.dtype).min / 2 if numbers else mask.bool() == MASKS[name]
    if of_tokens:
        return out
    return out.all(0, keepdim=True) if mask.dim() == 2 else out.flatten(1, -2).all(1)  # for all heads and queries
