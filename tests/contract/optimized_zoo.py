"""Optimized copies of the smallest model of each family: ``python -m tests.contract.optimized_zoo [NAME]...``

Prints a row for each: what was done, and how far the outputs are from the model's, relative to them, in float32 and, of the
errors in bfloat16, how much of the plain model's. Exits with 1 where the first is above 1e-5 or the second above 1.5.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict

import timm
import torch
from torch import nn

import se_inject
from se_inject import input_sizes
from se_inject.tools import zoo_table

from ..support.checks import randomise, total
from .zoo_sample import TABLE

MOST = 150e6  # parameters, as each is there several times


def smallest() -> list[str]:
    families = defaultdict(list)
    for row in zoo_table.read(TABLE):
        if not row.model.startswith("torchvision/") and row.params < MOST:
            families[row.family].append(row)
    return [min(rows, key=lambda r: r.params).model for rows in families.values()]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm())


@torch.no_grad()
def check(name: str, model: nn.Module) -> bool:
    x = torch.randn(2, *input_sizes(model)[0], generator=torch.Generator().manual_seed(1))
    expected = total(model(x))
    fast = se_inject.optimize_for_inference(model)
    off = relative(expected, total(fast(x)))
    share = float("nan")
    low = copy.deepcopy(model).bfloat16()
    try:
        plain = relative(expected, total(low(x.bfloat16())))
        share = relative(expected, total(se_inject.optimize_for_inference(low)(x.bfloat16()))) / plain
    except RuntimeError as error:  # the model's own, in this dtype
        print(f"{name}: not in bfloat16: {str(error).splitlines()[0][:80]}")
    ok = off < 1e-5 and not share > 1.5
    print(f"{name:45} {fast.se_report.summary()}; float32 {off:.1e}, bfloat16 {share:.2f}{'' if ok else '  <<<'}", flush=True)
    return ok


def main(names: list[str]) -> int:
    good = []
    for name in names or smallest():
        torch.manual_seed(0)
        model = randomise(timm.create_model(name)).eval()
        good.append(check(name, model))
        try:
            se_inject.inject(model)
        except se_inject.NoSitesError:
            continue
        good.append(check(f"se_inject/{name}", randomise(model)))
    print(f"{sum(good)} of {len(good)} are as they should be")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
