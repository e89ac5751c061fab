"""timm's own tests on injected models: ``python -m tests.contract.timm_suite PATH [--models NAME...] [-k EXPRESSION]``.

PATH is the folder of timm's tests, or one file of it; they are not in timm's wheel. Each test runs twice: with the plain
models, then with their twins, whose blocks have random weights. A failure counts only where the plain model passes; then the
exit code is 1. docs/timm-tests.md is the page.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.tables import markdown_table
from se_inject.tools import zoo_table

from .zoo_sample import TABLE

PLAIN, TWIN = "plain", "se_inject"
MARKS = ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout")


def small_models(count: int = 55) -> list[str]:
    """The smallest model that takes blocks of each family, for the `count` families with the smallest."""
    families = defaultdict(list)
    for row in zoo_table.read(TABLE):
        if row.status == "injected" and not row.model.startswith("torchvision/"):
            families[row.family].append(row)
    smallest = sorted((min(rows, key=lambda r: r.params) for rows in families.values()), key=lambda r: r.params)
    return [row.model for row in smallest[:count]]


class Suite:
    """A pytest plugin: runs each test with plain models, and with twins if that passes and makes a model."""

    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.twins = False
        self.made = False
        self.passed: set[str] = set()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[tuple[str, str]] = []

    def list_models(self, list_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
        """timm's function, whose answer has only the chosen models: each once, by its name or by one tag."""
        def listed(*args: Any, **kwargs: Any) -> list[str]:
            first: dict[str, str] = {}
            for name in list_all(*args, **kwargs):
                first.setdefault(name.partition(".")[0], name)
            return [first[model] for model in self.models if model in first]
        return listed

    def create_model(self, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """timm's function, which makes the twin in the second run of a test. Pretrained twins stay identities."""
        def made(name: str, pretrained: bool = False, *args: Any, **kwargs: Any) -> nn.Module:
            self.made = True
            model = create(f"se_inject/{name}" if self.twins else name, pretrained, *args, **kwargs)
            if self.twins and not pretrained:
                for p in se_inject.se_parameters(model):
                    nn.init.normal_(p)
            return model
        return made

    @pytest.fixture(autouse=True, params=[PLAIN, TWIN])
    def _kind(self, request: pytest.FixtureRequest) -> Iterator[None]:
        self.twins, self.made = request.param == TWIN, False
        if self.twins and _key(request.node.nodeid) not in self.passed:
            pytest.skip("the plain model does not pass, or the test makes none")
        torch.manual_seed(0)
        yield

    def pytest_configure(self, config: pytest.Config) -> None:
        for mark in MARKS:
            config.addinivalue_line("markers", f"{mark}: one of timm's")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2].partition("[")[0]
        kind = TWIN if self.twins else PLAIN
        if report.when == "call" and self.made:
            self.counts[f"{kind} {report.outcome}", name] += 1
            if report.passed and kind == PLAIN:
                self.passed.add(_key(report.nodeid))
        if report.failed and kind == TWIN:
            self.failures.append((report.nodeid, _error(report)))


def _key(nodeid: str) -> str:
    """What the two runs of a test have in common."""
    test, _, parameters = nodeid.partition("[")
    return f"{test} {[p for p in parameters.rstrip(']').split('-') if p not in (PLAIN, TWIN)]}"


def _error(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash is not None else report.longrepr).split())


def report(suite: Suite) -> int:
    """Print a row for each test, and each failure that counts; return how many these are."""
    outcomes = [f"{PLAIN} passed", f"{PLAIN} failed", f"{TWIN} passed", f"{TWIN} failed"]
    rows = [[name, *(str(suite.counts[o, name]) for o in outcomes)] for name in dict.fromkeys(n for _, n in suite.counts)]
    totals = [str(sum(int(row[i]) for row in rows)) for i in range(1, 5)]
    print(markdown_table(("test", *outcomes), [*rows, ["all", *totals]], left=("test",)))
    for nodeid, error in suite.failures:
        print(f"{nodeid}: {error[:300]}")
    return len(suite.failures)


def run(path: Path, models: list[str], options: list[str]) -> int:
    suite = Suite(models)
    folder = path if path.is_dir() else path.parent
    with (
        mock.patch.object(timm, "list_models", suite.list_models(timm.list_models)),
        mock.patch.object(timm, "list_pretrained", suite.list_models(timm.list_pretrained)),
        mock.patch.object(timm, "create_model", suite.create_model(timm.create_model)),
    ):
        pytest.main(
            [str(path), "-c", os.devnull, "--rootdir", str(folder), "--import-mode=importlib", "-p", "no:cacheprovider", "-q",
             "--tb=line", "--no-summary", "--continue-on-collection-errors", *options], plugins=[suite])
    return 1 if report(suite) else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract.timm_suite", description="timm's tests on injected models")
    parser.add_argument("path", type=Path, help="the folder tests of a clone of timm, or one file in it")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="names of timm; by default 55 small ones")
    args, options = parser.parse_known_args(argv)
    return run(args.path, args.models or small_models(), options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
