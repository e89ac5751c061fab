"""What a save replaces: links, modes, pipes, full disks, and what killed saves left."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.errors import WeightsError
from se_inject.weights.replacing import write_atomically

from ..cli.test_cli import call
from ..support.outputs import out
from ..support.processes import fresh, started

SHARDS = {"max_shard_size": "500KB"}


@pytest.fixture(scope="module")
def model():
    return timm.create_model("se_inject/test_resnet").eval()


def listed(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["file", "shards"])
@pytest.mark.parametrize("there", [True, False], ids=["file", "dangling"])
def test_a_link_is_followed(tmp_path, model, options, there):
    (tmp_path / "data").mkdir()
    (tmp_path / "runs").mkdir()
    real, link = tmp_path / "data" / "real.safetensors", tmp_path / "runs" / "link.safetensors"
    link.symlink_to(os.path.join("..", "data", "real.safetensors"))
    if there:
        se_inject.save(model, real)
    se_inject.save(model, link, **options)
    assert link.is_symlink() and listed(tmp_path / "runs") == ["link.safetensors"]
    for path in (link, real):
        assert torch.equal(out(se_inject.load(path)), out(model))
    assert real.exists() is not bool(options)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "socket"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, model, kind, monkeypatch):
    path = tmp_path / "m.safetensors"
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 107 bytes
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
            s.bind(path.name)
    else:
        path = "/dev/null"
        if kind != "device":
            path = tmp_path / "null"
            path.symlink_to("/dev/null")
    before = os.stat(path)
    for write in (lambda: se_inject.save(model, path), lambda: se_inject.save(model, path, **SHARDS),
                  lambda: write_atomically(path, lambda name: pytest.fail("it writes"))):
        with pytest.raises(WeightsError, match=f"which is a {kind.rpartition(' ')[2]}: give the name of a file"):
            write()
    after = os.stat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and len(listed(tmp_path)) <= 1
    err = call("inject", "test_resnet", "-o", path, code=1)[1]
    assert "cannot write" in err and "Traceback" not in err


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_keeps_its_mode_and_a_new_one_follows_the_umask(tmp_path, model, mask):
    before = os.umask(mask)
    try:
        def mode(path):
            return stat.S_IMODE(path.stat().st_mode)

        path = tmp_path / "m.safetensors"
        se_inject.save(model, path)
        assert mode(path) == 0o666 & ~mask
        for kept in (0o600, 0o640, 0o666):
            path.chmod(kept)
            se_inject.save(model, path)
            assert mode(path) == kept
        path.chmod(0o600)
        se_inject.save(model, path, **SHARDS)  # secret weights stay secret
        assert {mode(p) for p in tmp_path.iterdir()} == {0o600} and len(listed(tmp_path)) > 3
        se_inject.save(model, path)
        assert mode(path) == 0o600 and listed(tmp_path) == ["m.safetensors"]
        se_inject.save(model, tmp_path / "n.safetensors", **SHARDS)
        assert {mode(p) for p in tmp_path.iterdir() if p.name.startswith("n")} == {0o666 & ~mask}
    finally:
        os.umask(before)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_stays(tmp_path, model):
    path = tmp_path / "m.safetensors"
    se_inject.save(model, path)
    os.chown(path, 12, 34)
    path.chmod(0o640)
    for options in ({}, SHARDS):
        se_inject.save(model, path, **options)
        found = {(s.st_uid, s.st_gid, stat.S_IMODE(s.st_mode)) for s in map(os.stat, tmp_path.iterdir())}
        assert found == {(12, 34, 0o640)}


@pytest.mark.xdist_group("processes")
def test_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path):
    code = """
import pathlib, resource, sys, timm, torch, se_inject
from click.testing import CliRunner
from se_inject.cli import main
folder = pathlib.Path(sys.argv[1])
model = timm.create_model("se_inject/test_resnet")
se_inject.save(model, folder / "m.safetensors")
before = (folder / "m.safetensors").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
for name in ("m", "new"):
    for size in ("5GB", "700KB", "590KB"):  # some shards fit, and others do not
        try:
            se_inject.save(model, folder / f"{name}.safetensors", max_shard_size=size)
        except se_inject.SEInjectError as error:
            assert f"cannot write '{folder}/{name}.safetensors' (" in str(error) and "File too large" in str(error), error
        else:
            print("written", name, size)
result = CliRunner().invoke(main, ["inject", "test_resnet", "-o", str(folder / "m.safetensors")])
print(result.exit_code, "File too large" in result.output, type(result.exception).__name__)
assert (folder / "m.safetensors").read_bytes() == before
print(*sorted(p.name for p in folder.iterdir()))
"""
    done = fresh(code, tmp_path)
    assert done.stdout.splitlines() == ["1 True SystemExit", "m.safetensors"], done.stdout + done.stderr


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("options", [{}, SHARDS], ids=["file", "shards"])
def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path, model, options):
    """A process is killed while it writes. A process that lives keeps what it writes."""
    code = """
import pathlib, sys, time, timm, safetensors.torch, se_inject
def half(tensors, file, metadata=None):
    path = pathlib.Path(file)
    for name in (path, path.with_name(".tmpAbCd")):
        name.write_bytes(b"half")
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(600)
safetensors.torch.save_file = half
se_inject.save(timm.create_model("se_inject/test_resnet"), sys.argv[1], max_shard_size=sys.argv[3])
"""
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "m.safetensors"
    (path.parent / ".m.safetensors.ab_cd123.tmp").write_bytes(b"left by an earlier version")
    (path.parent / ".other.safetensors.ab_cd123.tmp").write_bytes(b"another's")
    (path.parent / ".m.safetensors.mine.tmp").write_bytes(b"the user's")
    kept = [".m.safetensors.mine.tmp", ".other.safetensors.ab_cd123.tmp"]
    children = []
    for i in range(2):
        ready = tmp_path / f"ready{i}"
        children.append(started(code, path, ready, options.get("max_shard_size", "5GB"),
                                files=[tmp_path / f"{i}.out", tmp_path / f"{i}.err"]))
        end = time.time() + 60
        while not ready.exists():
            assert time.time() < end and children[-1].is_alive(), (tmp_path / f"{i}.err").read_text()
            time.sleep(0.02)
    assert len(listed(path.parent)) == 5 - (i == 1)  # the second removed what the earlier version left
    os.kill(children[0].pid, signal.SIGKILL)
    children[0].join()
    se_inject.save(model, path)
    (left,) = set(listed(path.parent)) - {*kept, "m.safetensors"}
    assert (path.parent / left / ".tmpAbCd").exists()  # that of the process that lives
    os.kill(children[1].pid, signal.SIGKILL)
    children[1].join()
    se_inject.save(model, path)
    assert listed(path.parent) == sorted([*kept, "m.safetensors"])


def test_saves_to_one_name_at_a_time_do_not_mix(tmp_path):
    """Threads save models with one value each, as a file and in shards; at the end, and at any time, one of them is there."""
    path = tmp_path / "m.safetensors"
    models = []
    for value in range(4):
        net = timm.create_model("se_inject/test_resnet")
        net.load_state_dict({k: torch.full_like(t, value) for k, t in net.state_dict().items()})
        models.append(net)
    errors = []

    def save(i):
        try:
            for j in range(6):
                se_inject.save(models[i], path, max_shard_size=("5GB", "500KB")[(i + j) % 2])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    found = se_inject.load(path).state_dict()
    assert len({float(v) for t in found.values() for v in (t.min(), t.max())}) == 1
    assert sum("index" in name for name in listed(tmp_path)) + path.exists() == 1


@pytest.mark.parametrize("kind", ["rename", "write", "interrupt"])
@pytest.mark.parametrize("options", [{}, SHARDS], ids=["file", "shards"])
def test_an_error_leaves_the_old_save_and_nothing_else(tmp_path, model, monkeypatch, kind, options):
    path = tmp_path / "m.safetensors"
    se_inject.save(model, path, **options)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    error = KeyboardInterrupt() if kind == "interrupt" else OSError(28, "No space left on device")
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > bool(options):
            raise error
        return real(*args, **kwargs)

    import safetensors.torch
    where = (os, "replace") if kind == "rename" else (safetensors.torch, "save_file")
    real = getattr(*where)
    monkeypatch.setattr(*where, fails)
    with pytest.raises(KeyboardInterrupt if kind == "interrupt" else WeightsError) as info:
        se_inject.save(model, path, **options)
    if kind != "interrupt":
        assert "No space left on device" in str(info.value) and "what was there is unchanged" in str(info.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = timm.create_model("test_resnet")

    def forward(self, x):
        return self.body(x)


class Extra(Body):
    """A model with a state that is no tensor."""

    odd = None

    def get_extra_state(self):
        return self.odd

    def set_extra_state(self, state):
        pass


ODD = {
    "None": lambda: None,
    "a dict": lambda: {"a": 1},
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex128": lambda: torch.ones(2, dtype=torch.complex128),
    "meta": lambda: torch.ones(2, device="meta"),
    "lazy": lambda: nn.UninitializedParameter(),
    "freed": lambda: freed(),
    "fake": lambda: fake(),
}  # fmt: skip


def freed():
    t = torch.ones(3)
    t.untyped_storage().resize_(0)
    return t


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.filterwarnings("ignore:.*(nested|quant|deprecated|TypedStorage).*")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_no_file_holds_is_named_before_anything_is_written(tmp_path, kind):
    net = se_inject.inject(Body() if kind not in ("None", "a dict") else Extra(), input_size=(3, 64, 64))
    if isinstance(net, Extra):
        net.odd = ODD[kind]()
    else:
        net.register_buffer("odd", ODD[kind]())
    (tmp_path / "m.safetensors").write_bytes(b"old")
    for options in ({}, SHARDS):
        with pytest.raises(WeightsError, match=r"1 of \d+ entries of the state dict are .*\((odd|_extra_state)\)"):
            se_inject.save(net, tmp_path / "m.safetensors", **options)
    assert listed(tmp_path) == ["m.safetensors"] and (tmp_path / "m.safetensors").read_bytes() == b"old"
    se_inject.save(net, tmp_path / "se.safetensors", only="se")
    if kind != "meta":  # which `load` refuses
        se_inject.load(tmp_path / "se.safetensors", net)


def test_pending_signs_are_written(tmp_path):
    from se_inject.weights.reading import read_checkpoint
    from se_inject.weights.writing import write_safetensors

    z = torch.randn(3, dtype=torch.complex64)
    tensors = {"conj": z.conj(), "neg": z.conj().imag, "view": torch.arange(6.0).view(2, 3).t()}
    write_safetensors(tmp_path / "m.safetensors", tensors, {})
    found = read_checkpoint(tmp_path / "m.safetensors").tensors
    assert all(torch.equal(found[k], t) for k, t in tensors.items())
