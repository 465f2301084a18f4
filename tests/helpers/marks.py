"""Decorators that several files share: a test for each case, and what torch itself warns of."""

import pytest

from tests.helpers.cases import CASES, KINDS, LOSSES, MANY_PAIRS
from tests.helpers.module_cases import MODULE_CASES

each_case = pytest.mark.parametrize("case", CASES + MANY_PAIRS, ids=str)
each_loss = pytest.mark.parametrize("case", LOSSES, ids=str)
each_module = pytest.mark.parametrize("case", MODULE_CASES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)

# torch has no batching rule for its fused attention kernels yet: it loops, and says so.
torch_loops = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
torch_scripts = pytest.mark.filterwarnings(  # torch's own, in forward mode
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)
