"""Other processes: new ones that run code, and two of torch.distributed that get models and hand back what these do."""

from __future__ import annotations

import atexit
import contextlib
import copy
import datetime
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import nn

import se_inject
from se_inject import block_paths


def forkserver() -> BaseContext:
    """New processes are forked from a server that has imported torch, timm and se_inject, once for all of them."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "se_inject.surgery.pipeline", "se_inject.weights.files"])
    return context


def fresh(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` would, in a new process, where nothing of the tests but this file is imported."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = started(code, *args, files=files)
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode or 0, *(f.read_text() for f in files))


def started(code: str, *args: object, files: Sequence[Path] = ()) -> BaseProcess:
    """A new process that runs code and writes its output to `files`: those of stdout and stderr."""
    process = forkserver().Process(target=_execute, args=(code, [*map(str, args)], *map(str, files)))  # type: ignore[attr-defined]
    process.start()
    return process


@contextlib.contextmanager
def imported(path: Path) -> Iterator[Any]:
    """A script as a Python module, which other processes can import too; what stands beside it is found, as for a script."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[path.stem]


def script(path: Path, folder: Path) -> str:
    """Code that runs a script in a folder, with warnings as errors."""
    return (f"import os, runpy, sys, warnings\nos.chdir({str(folder)!r})\nwarnings.simplefilter('error')\n"
            f"sys.path.insert(0, {os.path.dirname(path)!r})\n"  # as `python SCRIPT` does
            f"sys.argv[0] = {str(path)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')")


def _execute(code: str, args: list[str], *files: str) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *args]
    torch.set_num_threads(1)
    exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})


def weighed(y: torch.Tensor) -> torch.Tensor:
    """A loss that tells outputs apart."""
    return (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).mean()


class Pair:
    """Two processes, one rank each."""

    def __init__(self) -> None:
        context = forkserver()
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pools = [ProcessPoolExecutor(1, context, _join, (rank, store)) for rank in range(2)]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        waiting = [pool.submit(function, *args) for pool in self.pools]
        return [future.result(timeout=120) for future in waiting]

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown()


@functools.cache
def pair() -> Pair:
    """Started by the first who asks, and kept until `part`."""
    new = Pair()
    atexit.register(new.close)
    return new


def part() -> None:
    """End the two processes, where there are some: they take as much memory as a worker."""
    if pair.cache_info().currsize:
        pair().close()
        pair.cache_clear()


def _join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))


def settled(model: nn.Module) -> nn.Module:
    """In train mode, but for what depends on the rest of the batch or on chance. The model is changed.

    Modules that keep what they computed from their weights do so in eval mode.
    """
    model.train()
    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout, DropPath)):
            m.eval()
    return model


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def two_steps(
    model: nn.Module, call: nn.Module, x: torch.Tensor
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train `model`, that is wrapped as `call`, in place. The gradients of the first step, and both losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, first = [], {}
    for step in range(2):
        loss = weighed(call(x))
        loss.backward()
        if step == 0:
            first = {k: whole(p.grad).clone() for k, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return first, losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor


def ddp(model: nn.Module, x: torch.Tensor, path: str) -> Any:
    """Two steps of DDP, each rank on its part of the batch."""
    model = copy.deepcopy(model)  # what comes from another process shares its memory
    mine = x.chunk(2)[dist.get_rank()]
    found = two_steps(model, nn.parallel.DistributedDataParallel(model), mine)
    if block_paths(model) and dist.get_rank() == 0:
        se_inject.save(model, path)
    return *found, output(model, x)


def fsdp(model: nn.Module, x: torch.Tensor, path: str, parts: list[str]) -> Any:
    """Two steps of FSDP2, with the modules at `parts` sharded one by one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for part in parts:
        fully_shard(model.get_submodule(part), mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = two_steps(model, model, x.chunk(2)[dist.get_rank()])
    assert all(isinstance(model.get_submodule(part), FSDPModule) for part in parts)
    if block_paths(model):
        se_inject.save(model, path)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return *found, output(model, x), state


def meta_fsdp(x: torch.Tensor, state: dict[str, torch.Tensor], load: str) -> torch.Tensor:
    """The output of an injected model that was sharded on the meta device, and then got the base's weights."""
    import timm
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = timm.create_model("se_inject/test_resnet").eval()
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.layer1, model.layer2, model.layer3, model.layer4, model):
        fully_shard(part, mesh=mesh)
    if load in ("empty", "reset"):
        model.to_empty(device="cpu")
    if load == "reset":
        for m in model.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=load == "broadcast")
    set_model_state_dict(model, dict(state) if load != "broadcast" or dist.get_rank() == 0 else {}, options=options)
    return output(model, x)
