"""Digests of the base, in the header of a file of blocks: do they stand on the base of their training?

A digest is two sums of a tensor's values, each value with a pseudo-random sign. If two tensors differ by a distance d, their
digests differ by about d, so that a digest says how far a tensor is from another one. A hash would not tell a copy of the
base in half precision, which is the same base, from another base.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import struct
from collections.abc import Collection, Mapping

import torch

from ..surgery.parts import Parts
from ..undo import entered
from .writing import has_memory, is_sharded

KEY = "se_inject_base"  # of the digests in the header of a file
_COLUMNS = 4096  # a large tensor is multiplied by signs of columns, then by signs of rows
_SUMS = 2
# Of a tensor's norm: what sums in another order may differ by in float32.
_ROUNDING = 2.0**-16
_logger = logging.getLogger("se_inject")


def digests(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digests of tensors as JSON, by dtype and name.

    Two dtypes are compared within the rounding of the coarser one, so that the dtype belongs to the digest.
    """
    said: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        packed = struct.pack(f"<{_SUMS}f", *_sums(tensor)[0])
        said.setdefault(str(tensor.dtype).removeprefix("torch."), {})[key] = base64.b64encode(packed).decode().rstrip("=")
    return json.dumps(said)


def of_the_base(parts: Parts) -> dict[str, torch.Tensor]:
    """The tensors that have digests: those of base and head that say what the model computes, and have values."""
    return {
        key: t for key, t in {**parts.base, **parts.head}.items()
        if not key.endswith("num_batches_tracked") and (is_sharded(t) or (
            type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided and not t.is_meta
            and not t.is_nested and not t.is_quantized and has_memory(t)))}


def warn_of_another_base(
    text: str, parts: Parts, tensors: Mapping[str, torch.Tensor], source: object, ignored: Collection[str] = ()
) -> None:
    """Log a warning if the digests in the header of `source` are of another base.

    Args:
        text: What `digests` wrote.
        parts: Those of the loaded model.
        tensors: Those that were loaded into it, as the files have them: their dtype decides how exactly they are compared.
        source: The file, for the message.
        ignored: Names of tensors that may differ without a warning.
    """
    have = {**of_the_base(parts), **tensors}
    try:
        said = {key: (_unpacked(packed), _coarse(getattr(torch, dtype)))
                for dtype, of_dtype in json.loads(text).items() for key, packed in of_dtype.items() if key not in ignored}
        distances = {key: _distance(*digest, have.get(key)) for key, digest in said.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, struct.error) as error:
        _logger.warning("%s: its digests of the base cannot be read (%s), so that the base is not compared", source, error)
        return
    differ = {key: distance for key, distance in sorted(distances.items(), key=lambda d: -d[1]) if distance}
    if not differ:
        return
    named = ", ".join(f"{key} ({_said(distance)})" for key, distance in list(differ.items())[:5])
    advice = []
    if any(key in parts.stats for key in differ):
        advice.append("statistics move in model.train(), unless freeze_base(model) holds them, and save(..., only=('se', "
                      "'stats')) writes them with the blocks")
    if any(key in parts.head for key in differ):
        advice.append("only=('se', 'head') writes a new head with the blocks")
    if any(key in parts.norms for key in differ):
        advice.append("only=('se', 'norms') writes norms that learned, as with freeze_base(model, norms=True)")
    if any(key not in parts.stats and key not in parts.head for key in differ):
        advice.append("give the base that the blocks were trained on, unless another one is what you want")
    _logger.warning(
        "%s was saved over another base: %d of %d tensors differ: %s%s: %s", source, len(differ), len(said), named,
        ", ..." if len(differ) > 5 else "", "; ".join(advice))


def _said(distance: float) -> str:
    return "not there" if distance == float("inf") else f"by {distance:.1%}" if distance < 10 else f"{distance:.0f} times"


def _distance(said: tuple[float, ...], coarse: tuple[float, float], tensor: torch.Tensor | None) -> float:
    """How far a tensor is from the one with the digest `said`, over its norm; 0 if rounding explains it."""
    if tensor is None:
        return float("inf")
    sums, norm = _sums(tensor)
    eps, step = (max(pair) for pair in zip(coarse, _coarse(tensor.dtype)))
    # each sum has n errors of random sign, and no error is larger than half of eps, or of the smallest step
    allowed = 4 * (eps * norm + step * tensor.numel()**0.5)
    apart = [abs(a - b) for a, b in zip(said, sums) if str(a) != str(b)]  # nan and inf equal themselves
    if all(a <= allowed for a in apart):
        return 0.0
    distance = (sum(a * a for a in apart) / _SUMS) ** 0.5 / max(norm, 1e-30)
    return distance if distance < 1e6 else 1e6  # nan is far, too


def _coarse(dtype: torch.dtype) -> tuple[float, float]:
    """The relative error of a dtype, at least that of the sums, and its smallest step."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype")
    if not dtype.is_floating_point:
        return _ROUNDING / 4, 0.0
    info = torch.finfo(dtype)
    return max(info.eps, _ROUNDING / 4), info.smallest_normal * info.eps


def _unpacked(packed: str) -> tuple[float, ...]:
    return struct.unpack(f"<{_SUMS}f", base64.b64decode(packed + "=" * (-len(packed) % 4)))


@torch.no_grad()
def _sums(tensor: torch.Tensor) -> tuple[list[float], float]:
    """The sums of a tensor's values with signs, in the precision of a digest, and its norm."""
    flat = (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()  # type: ignore[attr-defined]
    flat = torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat
    with entered(torch.autocast("cpu", enabled=False)):
        flat = flat.to("cpu", torch.float32).reshape(-1)
        rows = flat.numel() // _COLUMNS
        body, tail = flat[:rows * _COLUMNS].view(rows, _COLUMNS), flat[rows * _COLUMNS:].double()
        sums = []
        for i in range(_SUMS):
            columns = _signs(f"columns {i}", _COLUMNS)
            total = torch.dot(tail, columns[:tail.numel()])
            if rows:
                total += torch.dot(torch.mv(body, columns.float()).double(), _signs(f"rows {i}", rows))
            sums.append(float(total))
        norm = float(torch.linalg.vector_norm(flat))
    return torch.tensor(sums, dtype=torch.float32, device="cpu").tolist(), norm


def _signs(name: str, count: int) -> torch.Tensor:
    """The first `count` signs of a stream, the same on every machine and with every torch."""
    return _stream(name, 1 << max(12, (count - 1).bit_length()))[:count]


@functools.lru_cache(maxsize=8)
def _stream(name: str, count: int) -> torch.Tensor:
    octets = torch.frombuffer(bytearray(hashlib.shake_128(name.encode()).digest(count // 8)), dtype=torch.uint8)
    bits = octets[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1
    return bits.reshape(-1).double() * 2 - 1
