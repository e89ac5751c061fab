"""Outputs of models, flattened and compared."""

import torch

from se_inject.capture.values import equal, tensors


def test_tensors_are_found_in_nested_outputs():
    x, y = torch.ones(2), torch.zeros(2)
    found = tensors({"a": [x, None], "b": (3, {"c": y})})
    assert len(found) == 2 and found[0] is x and found[1] is y


def test_equal_outputs_have_the_same_structure_and_values():
    x, y = torch.ones(2), torch.zeros(2)
    assert equal((x, {"a": [y, None, 3]}), (x.clone(), {"a": [y.clone(), None, 3]}))
    assert not equal([x, y], [x, x])
    assert not equal([x, y], (x, y))
    assert not equal([x, 3], [x, 4])
    assert not equal([x, None], [x, y])
    assert not equal(x, torch.full((2,), torch.nan))
