"""What the formulas share in arithmetic."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from featkd.losses._numerics import dtype_for_few, savable


def test_a_tensor_made_under_inference_mode_is_copied_only_for_a_gradient():
    with torch.inference_mode():
        frozen = torch.ones(2, 3, 4, 5)
        assert savable(frozen) is frozen
    with torch.no_grad():
        assert savable(frozen) is frozen
    copied = savable(frozen)
    assert not copied.is_inference()
    assert savable(copied) is copied


@pytest.mark.parametrize(
    ("device", "dtype", "wide"),
    [
        ("cpu", torch.bfloat16, torch.float64),
        ("cuda", torch.bfloat16, torch.float64),
        ("meta", torch.bfloat16, torch.float32),
        ("meta", torch.float64, torch.float64),
    ],
)
def test_few_numbers_are_wide_where_the_device_is_known_to_have_it(device, dtype, wide):
    with FakeTensorMode():
        assert dtype_for_few(torch.empty(1, dtype=dtype, device=device)) == wide
