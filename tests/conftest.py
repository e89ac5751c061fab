from __future__ import annotations

import ctypes
import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def uninitialized_is_nan():
    """Memory without values holds NaN, and not what happens to be there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    """Collect garbage rarely: imported objects live on, and a graph is many objects that are freed together."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_runtest_teardown(item):
    """Give the memory of large models back: there are two workers, and glibc keeps what is freed."""
    if item.get_closest_marker("contract"):
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def pytest_addoption(parser):
    parser.addoption("--overwrite", action="store_true", help="write what the pages in docs/ show again")


def pytest_configure(config):
    torch.set_num_threads(1)  # one process of pytest-xdist for each core
