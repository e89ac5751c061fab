"""`se-inject run`: a script that knows nothing of se_inject runs as `python SCRIPT` would run it, and has the twins."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..support.versions import needs_quiet_end

CLONE = str(Path(__file__).parents[2])
PYTHON = [sys.executable]
RUN = [sys.executable, "-W", "error", "-m", "se_inject", "run"]


def call(*args: object, code: int = 0, cwd: object = None) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": CLONE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def script(tmp_path):
    """Writes a file beside the others in `tmp_path`."""
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def test_as_python_runs_it(script, tmp_path):
    script("beside.py", "X = 3")
    path = script("show.py", """
        import sys
        import beside
        print(__name__, __file__, __spec__ and __spec__.name, sys.argv, sys.path[0], beside.X)
        print(sys.modules["__main__"].__dict__ is globals())
        """)
    args = ["--help", "-q", "--ratio", "2", "--", "x y", ""]
    expected = call(*PYTHON, path, *args, cwd=tmp_path)
    assert "'--help', '-q', '--ratio', '2', '--', 'x y', ''" in expected.stdout
    assert call(*RUN, path, *args, cwd=tmp_path).stdout == expected.stdout
    by_name = call(*PYTHON, "-m", "show", *args, cwd=tmp_path)
    assert call(*RUN, "-m", "show", *args, cwd=tmp_path).stdout == by_name.stdout


@pytest.mark.parametrize("text, code", [
    ("def f(x):\n    return 1 / x\nprint('before')\nf(0)", 1),
    ("try:\n    1 / 0\nexcept Exception as e:\n    raise KeyError('k') from e", 1),
    ("x = (", 1),
    ("import sys; sys.exit(7)", 7),
    ("raise SystemExit('words')", 1),
    ("import click; raise click.ClickException('mine')", 1),
    ("from se_inject.errors import ConfigError; raise ConfigError('mine')", 1),
    ("import sys; sys.excepthook = lambda t, e, tb: print('hook', e, file=sys.stderr); 1 / 0", 1),
])  # fmt: skip
def test_it_ends_as_python_ends_it(script, text, code):
    path = script("end.py", text)
    expected, mine = call(*PYTHON, path, code=code), call(*RUN, path, code=code)
    assert (mine.stdout, mine.stderr) == (expected.stdout, expected.stderr)


def test_an_interrupt(script):
    path = script("wait.py", "raise KeyboardInterrupt")
    mine = call(*RUN, path, code=128 + signal.SIGINT)
    assert mine.stderr == call(*PYTHON, path, code=-signal.SIGINT).stderr


@needs_quiet_end
def test_the_twins_are_there_and_the_script_decides_on_logging(script):
    path = script("build.py", """
        import logging
        import sys
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)
        logging.getLogger("se_inject").info("a line")
        if "build" in sys.argv:
            import timm
            model = timm.create_model("se_inject/resnet10t", num_classes=2)
            model.load_state_dict({k: t for k, t in model.state_dict().items() if ".se." not in k})
        """)
    done = call(*RUN, path, "build")
    line, injected, counts = done.stdout.splitlines()
    assert line == "se_inject: a line" and done.stderr == "" and "blocks injected" in injected
    assert counts.startswith("se_inject: ") and "base tensors loaded" in counts and "SE tensors at identity" in counts
    quiet = call(sys.executable, "-m", "se_inject", "-q", "run", path)
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_workers_find_the_functions_of_the_script(script):
    path = script("pool.py", """
        import multiprocessing
        import sys

        def double(x):
            return 2 * x, "timm" in sys.modules

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(double, (21,)))
        """)
    assert call(*RUN, path).stdout == "(42, False)\n"


@pytest.mark.contract
def test_workers_that_are_spawned(script):
    """A child imports the script again, without the plugin, until it gets a model that needs it."""
    path = script("spawn.py", """
        import multiprocessing
        import timm

        def there(model=None):
            return timm.is_model("se_inject/resnet10t")

        if __name__ == "__main__":
            import torch
            from torch.utils.data import DataLoader
            loader = DataLoader(range(4), batch_size=2, num_workers=1, multiprocessing_context="spawn")
            print(torch.cat(list(loader)).tolist())
            model = timm.create_model("se_inject/resnet10t", num_classes=2)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(there), pool.apply(there, (model,)))
        """)
    assert call(*RUN, path).stdout == "[0, 1, 2, 3]\nFalse True\n"


@pytest.mark.contract
@pytest.mark.parametrize("launch", [["-m", "se_inject", "run"], ["--no-python", *RUN]], ids=["-m", "--no-python"])
def test_torchrun(script, launch, tmp_path):
    path = script("train.py", """
        import os
        import sys
        import timm
        import torch
        from torch import distributed as dist
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        model = timm.create_model("se_inject/resnet10t", num_classes=2, se_ratio=float(sys.argv[1]), zero_init_last=False)
        model = torch.nn.parallel.DistributedDataParallel(model)
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))).sum().backward()
        grad = model.module.layer1[0].se.fc2.weight.grad
        grads = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(grads, grad)
        learns, same = grad.abs().sum().item() > 0, all(torch.equal(grads[0], g) for g in grads)
        with open(f"{sys.argv[2]}/{rank}", "w") as file:
            print(len(grads), learns, same, file=file)
        dist.barrier()
        os._exit(0)  # gloo's threads may abort, with any script, when Python is taken down around them
        """)
    call(*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *launch, path, 0.5, tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 True True\n"] * 2


@pytest.mark.parametrize("args, words", [
    (["none.py"], "there is no script 'none.py'"),
    ([], "Missing argument 'SCRIPT'"),
    (["--ratio", "none.py"], "--ratio"),
])  # fmt: skip
def test_asked_wrongly(args, words):
    assert words in call(*RUN, *args, code=2).stderr


def test_a_module_that_is_not_there():
    assert call(*RUN, "-m", "no_such_module", code=1).stderr == "ImportError: No module named no_such_module\n"
