"""A loss of features on a GPU is computed there. No GPU is needed to see that: shapes will do."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.module_cases import MODULE_CASES
from tests.helpers.tensors import trained


class Devices(TorchDispatchMode):
    """Remembers the devices of all tensors that go into operations or come out."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = tree_leaves((args, kwargs, result))
        self.seen |= {x.device.type for x in tensors if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.xfail(
    torch.__version__.startswith("2.4."),
    raises=RuntimeError,
    strict=True,
    reason="this torch starts the GPU of a fake tensor",
)
@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_a_forward_on_the_gpu_stays_there(case):
    with FakeTensorMode(), torch.device("cuda"):
        module = case.build()
        student, teacher = torch.empty(2, 4, 4, 6), torch.empty(2, case.teacher_channels, 4, 6)
        with Devices() as devices:
            value = module(student.requires_grad_(), teacher)
    assert value.device.type == "cuda"
    assert devices.seen == {"cuda"}


@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_a_backward_makes_nothing_on_the_cpu(case):
    """Autograd would start a GPU that is not there; the meta device has shapes as well."""
    with torch.device("meta"):
        module = case.build()
        student, teacher = torch.empty(2, 4, 4, 6), torch.empty(2, case.teacher_channels, 4, 6)
        with Devices() as devices:
            value = module(student.requires_grad_(), teacher).sum()
            torch.autograd.grad(value, [student, *trained(module)])
    assert devices.seen == {"meta"}
