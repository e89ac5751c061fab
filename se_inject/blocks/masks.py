"""Blocks on padded sequences: a token that no other may attend to is padding, and is left out of the squeeze."""

from __future__ import annotations

import torch

from ..errors import SEInjectError

# The arguments by which the field's layers take a mask of attention or of padding, and what marks a token to leave out:
# False in `attn_mask` (timm, `scaled_dot_product_attention`) and `attention_mask` (transformers), True in torch's own layers.
# In floats, the mask is added to the attention's logits.
MASKS = {"attn_mask": False, "attention_mask": False, "key_padding_mask": True, "src_key_padding_mask": True}
WEIGHS = "_se_weighs"  # attribute of a block whose squeeze is more than means and maxima over positions


def unpadded(
    x: torch.Tensor, weighs: bool, attn_mask: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None, src_key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """Which tokens are no padding, (N, L, 1); None for maps, which have no padding, and without a mask.

    Args:
        x: What a block is called with: (N, L, C) for tokens.
        weighs: Whether the block weighs the positions.
        attn_mask, attention_mask, key_padding_mask, src_key_padding_mask: The masks of the owner's call.

    Raises:
        SEInjectError: A mask does not say which tokens are padding, or the block weighs the positions.
    """
    none = attn_mask is None and attention_mask is None and key_padding_mask is None and src_key_padding_mask is None
    if torch.jit.is_scripting():  # TorchScript does not compile the other branch
        assert none, "TorchScript leaves out no padding: call the model without masks"
        return None
    else:
        masks = {"attn_mask": attn_mask, "attention_mask": attention_mask, "key_padding_mask": key_padding_mask,
                 "src_key_padding_mask": src_key_padding_mask}
        return None if none or x.dim() != 3 else _unpadded(x, weighs, masks)


def _unpadded(x: torch.Tensor, weighs: bool, masks: dict[str, torch.Tensor | None]) -> torch.Tensor:
    given = {name: mask for name, mask in masks.items() if mask is not None}
    if weighs:
        raise SEInjectError(
            "an injected block weighs the tokens that it squeezes, so padding would count: inject another block, such as "
            f"block='se', or call the model without {' and '.join(given)}")
    real = torch.ones(1, x.shape[1], 1, dtype=torch.bool, device=x.device)
    for name, mask in given.items():
        real = real & ~_padding(name, mask, x).unsqueeze(-1)
    return real


def filled(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """`x` with the mean of the other tokens for padding, so that means and maxima over all tokens are those of the others."""
    if real is None:
        return x
    total = torch.where(real, x, 0).sum(1, keepdim=True, dtype=torch.float32 if x.element_size() < 4 else x.dtype)
    mean = total / real.sum(1, keepdim=True).clamp(min=1)
    return torch.where(real, x, mean.to(x.dtype))


def restored(y: torch.Tensor, x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """`y` with the padding of `x`, which stays as it is."""
    return y if real is None else torch.where(real, y, x)


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
