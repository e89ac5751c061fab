"""The two tiers: `pytest` runs the tests for people, in minutes, and `pytest -m contract` the rest."""

from __future__ import annotations

from typing import Any

import pytest


def contract(*values: Any) -> list[Any]:
    """Values that only `pytest -m contract` takes: of one parameter, or as tuples of several."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.contract) for v in values]
