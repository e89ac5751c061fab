"""A model that was run is as it was, and so are other threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import timm
import torch
from torch import nn

import se_inject


@pytest.mark.parametrize("name, args", [("mobilenetv3_small_050", {"feature_cls": "hook"}), ("xception41p", {})])
def test_nothing_of_a_trace_stays_in_objects_that_modules_hold(name, args):
    model = timm.create_model(name, features_only=True, **args).eval()
    hooks = model.hooks
    assert hooks not in model.modules()

    def check():
        assert model.hooks is hooks and vars(hooks).keys() == before.keys()
        assert all(vars(hooks)[key] is value for key, value in before.items()) and not hooks._feature_outputs
        x = torch.randn(1, 3, 64, 64)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(map(torch.equal, twin(x), model(x)))
        hooks._feature_outputs.clear()

    before = dict(vars(hooks))
    se_inject.plan(model, input_size=(3, 64, 64), existing="stack")
    check()
    se_inject.inject(model, input_size=(3, 64, 64), existing="stack")
    check()
    se_inject.eject(model)
    check()


class Caches(nn.Module):
    """Keeps what it computes in containers inside objects inside containers."""

    class Kept:
        def __init__(self):
            self.values, self.last = {"all": [1, 2]}, None

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 8, 3), ([self.Kept()], {"one": self.Kept()})

    def forward(self, x):
        y = torch.relu(self.conv(x))
        for kept in (self.kept[0][0], self.kept[1]["one"]):
            kept.last = y
            kept.values["all"].append(y)
            kept.values[y] = y
        self.kept[1][y] = y
        return y


def test_nested_caches_are_as_they_were():
    model = Caches()
    (first,), named = model.kept
    se_inject.plan(model, input_size=(3, 16, 16))
    assert model.kept[0][0] is first and list(named) == ["one"]
    for kept in (first, named["one"]):
        assert kept.last is None and kept.values == {"all": [1, 2]}


def test_threads_wait_for_each_other_and_do_not_disturb_others():
    original, errors, ready, done = nn.Module.__call__, [], threading.Event(), threading.Event()
    other, x = timm.create_model("test_resnet").eval(), torch.randn(1, 3, 64, 64)
    expected = other(x)

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    def serve():
        while not done.is_set():
            assert torch.equal(other(x), expected)
            ready.set()

    def change():
        for _ in range(2):
            model = se_inject.inject(timm.create_model("test_resnet"))
            se_inject.optimize_for_inference(model.eval())
            se_inject.eject(model)

    serving = threading.Thread(target=guarded, args=(serve,))
    serving.start()
    ready.wait()
    changing = [threading.Thread(target=guarded, args=(change,)) for _ in range(3)]
    for t in changing:
        t.start()
    for t in changing:
        t.join()
    done.set()
    serving.join()
    assert not errors
    assert nn.Module.__call__ is original
