"""The tracer gives fx's own graphs, once for modules that are alike, and leaves torch as it was."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
from torch import fx, nn

import se_inject
from se_inject.capture import tracer
from se_inject.capture.forward import _OwnTracer, trace_forward
from se_inject.capture.graphs import same_graph
from se_inject.capture.snapshot import on_meta as abstract
from se_inject.errors import Refusal

from ..support.families import BY_TIER


class FxTracer(_OwnTracer):
    """The same tracer without what makes it quick."""

    trace = fx.Tracer.trace
    proxy = fx.Tracer.proxy
    create_arg = fx.Tracer.create_arg
    call_module = fx.Tracer.call_module
    tensor_attrs = None

    def is_leaf_module(self, m, module_qualified_name):
        return True


def _traced(module):
    try:
        return trace_forward(module, {})
    except Refusal as error:
        return str(error)


@pytest.mark.parametrize("family", BY_TIER)
def test_the_quick_tracer_gives_fx_own_graphs(family, monkeypatch):
    """But for ``x += y``, which fx takes for ``x + y``, and for `isinstance`, which fx answers with the class of its proxy."""
    model = family.create()
    with abstract(model):
        with tracer.patched():
            mine = {name: _traced(m) for name, m in model.named_modules()}
        monkeypatch.setattr("se_inject.capture.forward._OwnTracer", FxTracer)
        for name, m in model.named_modules():
            if "isinstance" in getattr(type(m).forward, "__code__", _traced.__code__).co_names:
                continue
            theirs = _traced(m)
            if isinstance(theirs, str) or isinstance(mine[name], str):
                assert isinstance(theirs, str) and isinstance(mine[name], str)  # in other words
            else:
                for n in mine[name].nodes:
                    n.target = tracer.IN_PLACE.get(n.target, n.target)
                assert same_graph(mine[name], theirs, {})
                assert [n.name for n in mine[name].nodes] == [n.name for n in theirs.nodes]


def test_one_trace_for_modules_that_are_alike(monkeypatch):
    count = Counter()
    trace = _OwnTracer.trace
    monkeypatch.setattr(_OwnTracer, "trace", lambda self, *args: count.update(["traces"]) or trace(self, *args))

    def traces(depth):
        model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=32)
        count.clear()
        se_inject.inject(model)
        return count["traces"]

    assert traces(2) == traces(5) > 0


def test_nn_module_is_as_it_was_after_an_error():
    class Bad(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    call, get = nn.Module.__call__, nn.Module.__getattr__
    for model in (nn.Sequential(Bad()), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())):
        with pytest.raises((se_inject.SEInjectError, ZeroDivisionError)):
            se_inject.inject(model, filter_fn=lambda site: 1 / 0)
        assert (nn.Module.__call__, nn.Module.__getattr__) == (call, get)
        assert tracer._open is None
