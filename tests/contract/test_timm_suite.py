"""The runner of timm's own tests, on tests like timm's."""

from __future__ import annotations

import subprocess
import sys

import pytest

TESTS = '''
import pytest
import torch
from timm import create_model, list_models


@pytest.mark.base
@pytest.mark.parametrize("model_name", list_models("test_*", exclude_filters=["test_vit*"], include_tags=True))
@pytest.mark.parametrize("batch_size", [1])
def test_outputs(model_name, batch_size):
    torch.manual_seed(1)
    assert create_model(model_name).eval()(torch.randn(batch_size, 3, 64, 64)).shape == (batch_size, 1000)


def test_keys():
    if any(".se." in key for key in create_model("test_resnet").state_dict()):
        raise ValueError("there is a block")


def test_of_no_model():
    assert True


def test_that_the_plain_model_fails():
    assert create_model("test_resnet") is None
'''


@pytest.mark.contract
def test_a_failure_counts_where_the_plain_model_passes(tmp_path):
    (tmp_path / "test_models.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.contract.timm_suite", str(tmp_path), "--models", "test_resnet", "test_vit"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    table = done.stdout[done.stdout.index("| test |"):].splitlines()
    assert table[2:] == [
        "| test_outputs | 1 | 0 | 1 | 0 |",
        "| test_keys | 1 | 0 | 0 | 1 |",
        "| test_that_the_plain_model_fails | 0 | 1 | 0 | 0 |",
        "| all | 2 | 1 | 1 | 1 |",
        "test_models.py::test_keys[se_inject]: ValueError: there is a block",
    ]
    assert subprocess.run([*command, "-k", "outputs"], capture_output=True).returncode == 0
