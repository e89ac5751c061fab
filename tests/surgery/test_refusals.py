"""What is refused before anything is done, with the call that works."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.errors import ConfigError, SEInjectError


@pytest.mark.parametrize("size", ["x", (3, 64), 224])
def test_a_wrong_input_size_is_said_wherever_a_model_is_run(size):
    model = timm.create_model("test_resnet").eval()
    with pytest.raises(ConfigError, match=r"expected \(C, H, W\)"):
        se_inject.optimize_for_inference(model, input_size=size)


def test_wrapped_models_are_refused_with_the_call_that_works():
    with pytest.raises(SEInjectError, match=r"inject\(model.module\)"):
        se_inject.inject(nn.DataParallel(timm.create_model("resnet18")))
    with pytest.raises(SEInjectError, match="_orig_mod"):
        se_inject.inject(torch.compile(timm.create_model("resnet18")))
    with pytest.raises(SEInjectError, match="create_model"):
        se_inject.inject("resnet18")


def test_errors_are_never_empty():
    with pytest.raises(ValueError, match="needs a message"):
        SEInjectError("")
    assert issubclass(se_inject.NoSitesError, ValueError) and issubclass(se_inject.NoSitesError, SEInjectError)
