"""How many operations a step takes: on a GPU each is a launch, which costs more than small maps.

python -m tests.contract.test_operations
"""

from functools import partial, reduce
from operator import add

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import featkd
from benchmarks import pyramid

CHANNELS, SHAPE = 8, (2, 8, 6, 5)


class Operations(TorchDispatchMode):
    """Counts those that compute on `least` numbers or more: no views, no empty memory."""

    def __init__(self, least=0):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        computes = not (func.is_view or "empty" in name or "detach" in name)
        self.count += computes and max(sizes, default=0) >= self.least
        return result


def counted(loss, levels=None):
    """Operations forward and backward of a loss of a student's and a teacher's features."""
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    if levels:
        student, teacher = dict.fromkeys(levels, student), dict.fromkeys(levels, teacher)
    with Operations() as forward:
        value = loss(student, teacher)
        value = sum(value.values()) if isinstance(value, dict) else value
    with Operations() as backward:
        value.backward()
    return forward.count, backward.count


# At most the plain formulas', but for the masks, which are computed in float64.
MORE = {"L_AM": 1}
TERMS = {
    "L_AT": (featkd.AttentionTransferLoss, {}, pyramid.transfer),
    "L_AM": (featkd.AttentionMaskedLoss, {"temperature": 4.0}, pyramid.masked),
    "L_AM, standardised": (
        featkd.AttentionMaskedLoss,
        {"temperature": None, "standardize": True},
        pyramid.correlation,
    ),
    "L_NLD": (featkd.NonLocalLoss, {"kind": "dot_product"}, pyramid.non_local),
}


def counts_of(term):
    loss, options, formula = TERMS[term]
    plain = partial(formula, pyramid.layers(CHANNELS, CHANNELS // 2))
    return counted(loss(CHANNELS, CHANNELS, **options)), counted(plain)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_takes_no_more_operations_than_its_plain_formula(term):
    ours, plain = counts_of(term)
    assert sum(ours) <= sum(plain) + MORE.get(term, 0)


PYRAMID = ("p3", "p4", "p5", "p6", "p7")
WHOLE = {
    "STANDARDIZED": [pyramid.correlation],
    "FPN_OUTPUTS": [pyramid.transfer, pyramid.masked, pyramid.non_local],
}


def counts_of_pyramid(preset):
    """The plain terms without their weights."""
    channels = dict.fromkeys(PYRAMID, CHANNELS)
    loss = featkd.FeatureDistillationLoss(channels, channels, getattr(featkd, preset))
    plain = pyramid.Plain(lambda *given: reduce(add, (f(*given) for f in WHOLE[preset])), channels)
    return counted(loss, PYRAMID), counted(plain, PYRAMID)


@pytest.mark.parametrize("preset", WHOLE)
def test_five_levels_take_fewer_operations_than_the_plain_formulas(preset):
    ours, plain = counts_of_pyramid(preset)
    assert sum(ours) < sum(plain)


SHARED = 32_768  # numbers: torch shares an operation on more among its threads


def test_threads_wait_for_each_other_no_more_often_than_in_plain_torch(monkeypatch):
    """On busy cores each operation that they share may wait for a turn of the scheduler."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images, channels, sizes = pyramid.BATCHES["2 x 800 x 1216"]
    student, teacher = pyramid.features(images, channels, sizes, torch.device("cpu"))
    counts = []
    for loss in pyramid.both("STANDARDIZED", dict.fromkeys(student, channels)):
        with Operations(SHARED) as operations:
            pyramid.step(loss, student, teacher)()
        counts.append(operations.count)
    plain, ours = counts
    assert ours < plain


if __name__ == "__main__":
    for name, (ours, plain) in {
        **{term: counts_of(term) for term in TERMS},
        **{f"{preset}, five levels": counts_of_pyramid(preset) for preset in WHOLE},
    }.items():
        print(f"{name:25} featkd {ours}  plain {plain}")
