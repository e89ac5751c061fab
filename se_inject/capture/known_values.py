"""Values on the meta device, as far as they do not depend on the inputs of a model: for heads that read numbers from tensors.

Every tensor is on the meta device. One whose value is known, and small, has it at hand: a buffer, a tensor made from a list,
and what is computed from these alone. An operator that gives Python a number, or a result whose size depends on values, is
answered from them. Where they are not known, it raises as on the meta device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .meta_ops import MetaOps
from .snapshot import ORIGINAL, is_small

_VALUE = "_se_value"  # of a tensor on the meta device
_aten = torch.ops.aten
_TO_PYTHON = {_aten._local_scalar_dense, _aten.equal}
_FROM_DATA = {torch.tensor: 0, torch.as_tensor: 0, torch.Tensor.new_tensor: 1}  # the position of the data


class _FromData(TorchFunctionMode):
    """Tensors from Python's numbers are made on the CPU, as on the meta device no operator would see the numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        data = args[_FROM_DATA[func]:][:1] if func in _FROM_DATA else ()
        device = kwargs.get("device") or (args[0].device if data and isinstance(args[0], torch.Tensor) else None)
        if data and not isinstance(data[0], torch.Tensor) and str(device) == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


class KnownValues(MetaOps):
    """`MetaOps` that keeps the values which it knows. It takes several times as long, for the runs that need it."""

    def __init__(self) -> None:
        super().__init__(factories=True)
        self._forgotten: set[torch.UntypedStorage] = set()
        self._from_data = _FromData()

    def __enter__(self) -> KnownValues:
        super().__enter__()
        self._from_data.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._from_data.__exit__(*raised)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet is _aten.lift_fresh and not args[0].is_meta:
            return _known(super().__torch_dispatch__(func, types, args, kwargs), args[0].clone())
        args, kwargs = tree_map(_with_value, (args, kwargs or {}))
        values = self._values(func, args, kwargs)
        if values is not None and (packet in _TO_PYTHON or _is_to_cpu(func, kwargs)):
            return func(*values[0], **values[1])
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        except NotImplementedError:  # the size of the result depends on values
            if values is None:
                raise
            return tree_map(_with_value, func(*values[0], **values[1]))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if values is None or not all(map(is_small, made)):
            self._forget(func, args)
            return out
        computed = func(*values[0], **values[1])
        for t, value in zip(made, (v for v in tree_leaves(computed) if isinstance(v, torch.Tensor))):
            _known(t, value)
        return out

    def _values(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The arguments with values for tensors; None where one is not known, or the result would be random."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not all(map(self._value, tensors)):
            return None
        if not tensors and (torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.__name__):
            return None
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        found: tuple[Any, Any] = tree_map(lambda v: v.__dict__[_VALUE] if isinstance(v, torch.Tensor) else v, (args, kwargs))
        return found

    def _value(self, t: torch.Tensor) -> bool:
        """Whether the value of a tensor is known; that of a buffer is copied when it is first asked for."""
        if _VALUE not in t.__dict__ and t.__dict__.get(ORIGINAL) is not None:
            original = t.__dict__[ORIGINAL]
            _known(t, original.detach().clone().cpu())
        value = t.__dict__.get(_VALUE)
        return value is not None and value.untyped_storage() not in self._forgotten

    def _forget(self, func: Any, args: Any) -> None:
        """Values that an operator of unknown result has written over are known no more, in all views of their memory."""
        for i, a in enumerate(func._schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write and i < len(args) and isinstance(args[i], torch.Tensor):
                value = args[i].__dict__.get(_VALUE)
                if value is not None:
                    self._forgotten.add(value.untyped_storage())


def _is_to_cpu(func: Any, kwargs: Any) -> bool:
    return func._overloadpacket is _aten._to_copy and str(kwargs.get("device")) == "cpu"


def _known(t: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if is_small(value):
        t.__dict__[_VALUE] = value
    return t


def _with_value(value: Any) -> Any:
    """For a tensor that is not on the meta device, one that is, with its value."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    return _known(torch.empty_like(value, device="meta"), value)
