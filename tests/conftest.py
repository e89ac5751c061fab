import ctypes

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_runtest_teardown():
    """Give free memory back: glibc keeps what large models leave, and there are two workers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pytest_addoption(parser):
    parser.addoption("--overwrite", action="store_true", help="write what the pages in docs/ show anew")


def pytest_configure(config):
    torch.set_num_threads(1)  # one process of pytest-xdist for each core
