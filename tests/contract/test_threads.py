"""Several threads that make models, and processes that are forked meanwhile."""

from __future__ import annotations

import copy
import os
import random
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject import block_paths

pytestmark = pytest.mark.contract
NAMES = ["test_resnet", "test_vit", "test_mambaout", "test_convnext", "test_efficientnet", "test_vit_relpos"]
PATCHED = ("__call__", "__getattr__", "__setattr__")


def made(name: str) -> list[str]:
    return block_paths(timm.create_model(f"se_inject/{name}"))


def test_models_of_eight_threads_while_another_trains():
    expected = {name: made(name) for name in NAMES}
    done, errors = threading.Event(), []

    def train():
        try:
            model = timm.create_model("test_resnet")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            while not done.is_set():
                optimizer.zero_grad()
                model(torch.randn(2, 3, 64, 64)).square().mean().backward()
                optimizer.step()
                random.random()
        except BaseException as error:
            errors.append(error)

    training = threading.Thread(target=train)
    training.start()
    names = [NAMES[i % len(NAMES)] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(made, names))
    done.set()
    training.join()
    assert not errors
    assert found == [expected[name] for name in names]


def child(plain: list[object], model: nn.Module, expected: list[str]) -> str:
    if [getattr(nn.Module, name) for name in PATCHED] != plain:
        return "nn.Module is patched"
    found = block_paths(se_inject.inject(model))
    return "" if found == expected else f"blocks are at {found}"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_while_another_thread_injects():
    """A fork waits, so that a child has an `nn.Module` without patches, and no lock that nobody holds.

    The models are copies: torch's random generator has a lock of its own, which a fork does not wait for.
    """
    base, other = timm.create_model("test_resnet"), timm.create_model("test_vit")
    expected = block_paths(se_inject.inject(copy.deepcopy(other)))
    plain, done = [getattr(nn.Module, name) for name in PATCHED], threading.Event()

    def work():
        while not done.is_set():
            se_inject.inject(copy.deepcopy(base))

    working = threading.Thread(target=work)
    working.start()
    answers = []
    try:
        for number in range(50):
            time.sleep(0.005 * (number % 7))
            answers.append(forked(lambda: child(plain, other, expected)))
    finally:
        done.set()
        working.join()
    assert answers == [""] * 50


def forked(function) -> str:
    """What a function returns in a child process."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = function()
        except BaseException as error:
            answer = repr(error)
        os.write(writes, answer.encode() or b" ")
        os._exit(0)
    os.close(writes)
    ready, _, _ = select.select([reads], [], [], 60)
    answer = os.read(reads, 4000).decode().strip() if ready else "it hangs"
    os.close(reads)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return answer
