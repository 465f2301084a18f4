"""How many operations a step takes: on a GPU each is a launch, which costs more than small maps.

python -m tests.contract.test_operations
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import featkd
from benchmarks import plain

CHANNELS, SHAPE = 8, (2, 8, 6, 5)


class Operations(TorchDispatchMode):
    """Counts those that compute: no views, no empty memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += not (func.is_view or "empty" in name or "detach" in name)
        return func(*args, **(kwargs or {}))


def counted(loss, levels=()):
    """Operations forward and backward of a loss of a student's and a teacher's features."""
    loss.zero_grad()
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    if levels:
        student, teacher = dict.fromkeys(levels, student), dict.fromkeys(levels, teacher)
    with Operations() as forward:
        value = loss(student, teacher)
        value = sum(value.values()) if isinstance(value, dict) else value
    with Operations() as backward:
        value.backward()
    return forward.count, backward.count


class Plain(nn.Module):
    """The formulas with adapters, as one would write them."""

    def __init__(self, formula) -> None:
        super().__init__()
        self.formula = formula
        self.features = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.spatial, self.channel = (
            nn.Conv2d(1, 1, 3, padding=1),
            nn.Linear(CHANNELS, CHANNELS),
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS // 2, 1) for _ in range(3)) for _ in range(2)
        )
        self.blocks[1].requires_grad_(False)
        self.relation = nn.Conv2d(CHANNELS // 2, CHANNELS // 2, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.formula(self, student, teacher)


def transfer(self, student, teacher):
    spatial = self.spatial(student.abs().mean(1, keepdim=True)) - teacher.abs().mean(1, True)
    channel = self.channel(student.abs().mean((2, 3))) - teacher.abs().mean((2, 3))
    return spatial.flatten(1).norm(dim=1).mean() + channel.norm(dim=1).mean()


def masked(self, student, teacher):
    with torch.no_grad():
        spatial, channel = plain.masks(student, teacher, 0.5)
    square = (teacher - self.features(student)) ** 2
    square = square * spatial[:, None] * channel[:, :, None, None]
    return square.sum((1, 2, 3)).sqrt().mean()


def standardized(self, student, teacher):
    def of(x):
        rest = x - x.mean((2, 3), keepdim=True)
        return rest / (rest.square().mean((2, 3), keepdim=True).sqrt() + 1e-6)

    return (of(self.features(student)) - of(teacher)).square().mean() / 2


def non_local(self, student, teacher):
    def of(layers, x):
        return plain.relation("dot_product", *(layer(x) for layer in layers))

    ours, theirs = (of(*pair) for pair in zip(self.blocks, (student, teacher), strict=True))
    ours = self.relation(ours.reshape(len(ours), -1, *SHAPE[2:])).flatten(2)
    return (ours - theirs).flatten(1).norm(dim=1).mean()


# At most the plain formulas', but for the masks: their four maps are each less its largest element.
MORE = {"L_AM": 7}
TERMS = {
    "L_AT": (featkd.AttentionTransferLoss(CHANNELS, CHANNELS), transfer),
    "L_AM": (featkd.AttentionMaskedLoss(CHANNELS, CHANNELS, temperature=0.5), masked),
    "L_AM, standardised": (
        featkd.AttentionMaskedLoss(CHANNELS, CHANNELS, temperature=None, standardize=True),
        standardized,
    ),
    "L_NLD": (featkd.NonLocalLoss(CHANNELS, CHANNELS, kind="dot_product"), non_local),
}


@pytest.mark.parametrize("term", TERMS)
def test_a_term_takes_no_more_operations_than_its_plain_formula(term):
    loss, formula = TERMS[term]
    assert sum(counted(loss)) <= sum(counted(Plain(formula))) + MORE.get(term, 0)


class PlainPyramid(nn.Module):
    def __init__(self, formulas) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(
            {level: nn.ModuleList(map(Plain, formulas)) for level in PYRAMID}
        )

    def forward(self, student, teacher) -> Tensor:
        terms = ((level, term) for level, terms in self.levels.items() for term in terms)
        return sum(term(student[level], teacher[level]) for level, term in terms)


PYRAMID = ("p3", "p4", "p5", "p6", "p7")
WHOLE = {
    name: (
        featkd.FeatureDistillationLoss(
            *(dict.fromkeys(PYRAMID, CHANNELS) for _ in range(2)), getattr(featkd, name)
        ),
        PlainPyramid(formulas),
    )
    for name, formulas in {
        "STANDARDIZED": [standardized],
        "FPN_OUTPUTS": [transfer, masked, non_local],
    }.items()
}


@pytest.mark.parametrize("preset", WHOLE)
def test_five_levels_take_fewer_operations_than_the_plain_formulas(preset):
    loss, formulas = WHOLE[preset]
    assert sum(counted(loss, PYRAMID)) < sum(counted(formulas, PYRAMID))


if __name__ == "__main__":
    for name, (loss, formula) in TERMS.items():
        print(f"{name:20} featkd {counted(loss)}  plain {counted(Plain(formula))}")
    for name, (loss, formulas) in WHOLE.items():
        found, plain_count = counted(loss, PYRAMID), counted(formulas, PYRAMID)
        print(f"{name:20} featkd {found}  plain {plain_count}, five levels")
