"""Private names of torch, timm and safetensors: each that the package imports, and what is done where a version lacks it.

Tried with torch 2.6 to 2.14 and timm 1.0.15 to 1.0.31. A name without a remark is in all of them. Three things stay where
they are used: `torch.utils._pytree` and `torch.utils._python_dispatch`, on which other packages rely as on public modules;
attributes of an object, such as `_parameters` of a module and `_schema` of an operator; methods that a subclass overrides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as _fx

# classes

ConvNd = nn.modules.conv._ConvNd
DropoutNd = nn.modules.dropout._DropoutNd
OpOverloadPacket = torch._ops.OpOverloadPacket

# how modules of torch load their own tensors: all, and batch norms, which know an older format
PLAIN_LOADS = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)

# autograd and operators

WITH_MESSAGE = frozenset((torch._assert, torch._check, torch._check_value))  # functions that check and take a message

_top_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
SEES_SAVED_TENSORS_HOOKS = _top_hooks is not None  # not in torch 2.6


def transforms_are_active() -> bool:
    """Whether vmap, jvp or another transform of `torch.func` is active."""
    return bool(torch._C._are_functorch_transforms_active())


def is_dual(t: torch.Tensor) -> bool:
    """Whether `t` has a tangent, of forward-mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def is_legacy_batched(t: torch.Tensor) -> bool:
    """Whether `t` is a batch of gradients, as `torch.autograd.grad` makes for ``is_grads_batched=True``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(t))


def saved_by_batch_norm(x: torch.Tensor) -> tuple[Any, ...] | None:
    """What autograd saves for the batch norm in train mode whose output is `x`: input, weight, bias, mean, 1/deviation.

    None if `x` has another source, or if hooks have changed what autograd saves. Where torch does not tell whether there
    are hooks, None for every `x`: the output of the norm is then saved, as for other layers.
    """
    fn: Any = x.grad_fn
    if type(fn).__name__ != "NativeBatchNormBackward0" or not fn._saved_training or _top_hooks is None or (
            _top_hooks(True) is not None):
        return None
    bias = getattr(fn.next_functions[2][0], "variable", None)  # None unless it is a leaf
    return fn._saved_input, fn._saved_weight, bias, fn._saved_result1, fn._saved_result2


def schemas_of(operator: str) -> list[Any]:
    """The schemas of all overloads of an operator, such as ``"aten::add"``."""
    return list(torch._C._jit_get_schemas_for_operator(operator))


def copy_each(into: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Copy each of `tensors` into its counterpart, in one call, which no signal interrupts."""
    torch._foreach_copy_(into, tensors)


# torch.fx

module_call: Callable[..., Any] = _fx._orig_module_call  # that of `nn.Module` when no tracer has patched it
module_getattr: Callable[..., Any] = _fx._orig_module_getattr
as_one_node: Callable[..., Any] = _fx._create_wrapped_func

# types of the attributes of a module that a graph reads by name; before torch 2.9 fx spells them out where it asks
_PLAIN_CONSTANTS = (torch.Tensor, torch.ScriptObject)
constant_types: tuple[type, ...] = getattr(_fx, "_constant_attribute_types", _PLAIN_CONSTANTS)


def names_to_wrap() -> list[tuple[dict[str, Any], str]]:
    """The functions that `torch.fx.wrap` has registered: the namespace and the name of each."""
    return [(namespace, name) for (_, name), namespace in _fx._wrapped_fns_to_patch.items()]


def fx_is_tracing() -> bool:
    """Whether fx traces; in older torch, whether it does in one of the threads."""
    if hasattr(_fx, "_get_is_fx_tracing"):
        return bool(_fx._get_is_fx_tracing())
    return bool(_fx._is_fx_tracing_flag)  # type: ignore[attr-defined]


def set_fx_tracing(tracing: bool) -> None:
    if hasattr(_fx, "_set_is_fx_tracing"):
        _fx._set_is_fx_tracing(tracing)
    else:
        _fx._is_fx_tracing_flag = tracing  # type: ignore[attr-defined]


# safetensors


def safetensors_dtypes() -> frozenset[torch.dtype]:
    """The data types that a safetensors file holds."""
    from safetensors.torch import _SIZE

    return frozenset(t for t in _SIZE if isinstance(t, torch.dtype))


# transformers


def names_in_files(model: nn.Module) -> dict[str, str]:
    """The names of a model's tensors by those in its files, where they differ: transformers writes some older names.

    Empty where transformers has no such names, or the model is not its own.
    """
    if not any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5
        return {}
    own = dict(model.state_dict(keep_vars=True))
    names = {id(t): key for key, t in own.items()}
    written = revert_weight_conversion(model, dict(own))  # type: ignore[arg-type]
    return {key: names[id(t)] for key, t in written.items() if key not in own and id(t) in names}


# timm; imported inside functions, because the import takes seconds


def feature_getter() -> Any:
    """The class of timm that ``create_model(features_only=True)`` puts around a model that traces nothing."""
    from timm.models._features import FeatureGetterNet

    return FeatureGetterNet


def home_of(name: str) -> str | None:
    """The Python module that registers a model name; None for an unknown name."""
    from timm.models._registry import _model_to_module

    return _model_to_module.get(name)


def registry() -> Any:
    """timm's Python module with the tables of models."""
    from timm.models import _registry

    return _registry


def entrypoints() -> dict[str, Callable[..., Any]]:
    """timm's table of the functions that create models."""
    table: dict[str, Callable[..., Any]] = registry()._model_entrypoints
    return table


def _timm_functions() -> dict[str, Any]:
    """The functions of timm that are wrapped, and the module through which timm calls each."""
    from timm.models import _builder, _factory, _hub

    return {
        "parse_model_name": _factory, "load_pretrained": _builder, "save_config_for_hf": _hub, "list_models": registry()}


def missing_in_timm(functions: Iterable[str]) -> list[str]:
    """Those of `functions` that this timm does not have; the caller refuses, as timm would then build plain models."""
    modules = _timm_functions()
    return [name for name in functions if not hasattr(modules[name], name)]


def replace_in_timm(tables: Mapping[str, Any], wrappers: Mapping[str, Callable[[Any], Any]]) -> None:
    """Put `tables` in the place of the registry's own, and around each function of timm what `wrappers` makes of it.

    No code of Python runs between the replacements, so that an interrupt leaves either all or none.
    """
    import timm
    from timm.models import _builder, _factory, _hub

    parse, load, save, listed = (
        wrappers[name](getattr(module, name)) for name, module in _timm_functions().items())
    _factory.parse_model_name, _builder.load_pretrained, _hub.save_config_for_hf = parse, load, save
    timm.list_models = timm.models.list_models = listed
    vars(registry()).update(tables, list_models=listed)


def compiling_up_to(count: int) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch.compile compiles so many variants of one forward; beyond its own limit it runs them uncompiled."""
    import torch._dynamo.config

    patch: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(cache_size_limit=count)
    return patch
