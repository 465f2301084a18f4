"""What the formulas share in arithmetic."""

import torch

from featkd.losses._numerics import savable


def test_a_tensor_made_under_inference_mode_is_copied_only_for_a_gradient():
    with torch.inference_mode():
        frozen = torch.ones(2, 3, 4, 5)
        assert savable(frozen) is frozen
    with torch.no_grad():
        assert savable(frozen) is frozen
    copied = savable(frozen)
    assert not copied.is_inference()
    assert savable(copied) is copied
