import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--overwrite", action="store_true", help="write what the pages in docs/ show anew")


def pytest_configure(config):
    torch.set_num_threads(1)  # one process of pytest-xdist for each core
