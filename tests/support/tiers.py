"""The two tiers: `pytest` runs the tests for people, in minutes, and `pytest -m contract` the rest."""

from __future__ import annotations

from typing import Any

import pytest


def contract(*values: Any, **kwargs: Any) -> list[Any]:
    """Values of one parameter that only `pytest -m contract` takes; `kwargs` are those of `pytest.param`."""
    return [pytest.param(value, marks=pytest.mark.contract, **kwargs) for value in values]
