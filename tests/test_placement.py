"""A teacher in another dtype or on another device."""

from collections import OrderedDict, UserDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from featkd import Distiller
from featkd._placement import home, placed
from tests.helpers.distilled import COUNTS, FLOAT, Inputs, Seen, build
from tests.helpers.models import LEVELS, Net, images, raises


class Batch(NamedTuple):
    pixels: torch.Tensor
    sizes: torch.Tensor


class Pair(list):
    """A list that is not built of a list."""

    def __init__(self, first, second):
        super().__init__([first, second])


class Keeps(Net):
    """Keeps what it was called with, and takes the batch out of it."""

    def forward(self, first, **options):
        self.seen = first, options
        batch = first
        while not isinstance(batch, torch.Tensor):
            batch = batch["pixels"] if isinstance(batch, Mapping) else batch[0]
        return super().forward(batch)


STRUCTURES = {
    "a tensor": FLOAT,
    "a list": [FLOAT, COUNTS],
    "a tuple": (FLOAT, None),
    "a named tuple": Batch(FLOAT, COUNTS),
    "a dictionary": {"pixels": FLOAT, "sizes": COUNTS},
    "an ordered one": OrderedDict(pixels=FLOAT, sizes=COUNTS),
    "another mapping": UserDict(pixels=FLOAT, sizes=COUNTS),
    "a list of a kind": Pair(FLOAT, COUNTS),
    "nested": [{"pixels": (FLOAT,), "sizes": [COUNTS]}],
}


def equal_structure(ours, expected):
    """Of the same kinds, and with floating-point tensors in float64."""
    assert type(ours) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(ours, expected.double() if expected.is_floating_point() else expected)
    elif isinstance(expected, Mapping):
        assert list(ours) == list(expected)
        equal_structure(list(ours.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        for pair in zip(ours, expected, strict=True):
            equal_structure(*pair)
    else:
        assert ours is expected


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_the_teachers_arguments_come_in_its_dtype(structure, early_stop):
    student, teacher = Keeps(4).float(), Keeps(6)
    distiller = Distiller(student, teacher, Seen(), LEVELS, early_stop=early_stop)
    tag = object()
    distiller(structure, scale=FLOAT, tag=tag)
    first, options = student.seen
    assert first is structure
    assert options["scale"] is FLOAT
    first, options = teacher.seen
    equal_structure(first, structure)
    assert options["scale"].dtype == torch.float64
    assert options["tag"] is tag


def test_a_mapping_that_cannot_be_written_reaches_the_teacher_as_a_dictionary():
    student, teacher = Keeps(4).float(), Keeps(6)
    Distiller(student, teacher, Seen(), LEVELS)(MappingProxyType({"pixels": FLOAT, "tag": "a"}))
    equal_structure(teacher.seen[0], {"pixels": FLOAT, "tag": "a"})


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_arguments_that_fit_are_handed_on_as_they_are(structure):
    student, teacher = Keeps(4).float(), Keeps(6).float()
    Distiller(student, teacher, Seen(), LEVELS)(structure)
    assert teacher.seen[0] is structure


def test_the_arguments_of_teacher_forward_come_in_the_teachers_dtype():
    distiller = Distiller(
        Net(4).float(), Net(6), Seen(), LEVELS, teacher_forward=lambda model, batch: model(batch)
    )
    distiller(FLOAT)
    assert distiller.loss.teacher["c1"].dtype == torch.float64


class Casts(Net):
    def forward(self, batch):
        self.seen = batch
        return super().forward(batch.double())


@pytest.mark.parametrize("other", [torch.float32, torch.float8_e5m2, None])
def test_a_teacher_of_several_dtypes_or_none_takes_its_arguments_as_they_are(other):
    teacher = Casts(6)
    if other is None:
        teacher = Bare()
    else:
        teacher.other = nn.Parameter(torch.zeros(1, dtype=torch.float32).to(other), False)
    layers = LEVELS if other else {"c1": ("backbone.c1", "")}
    distiller = Distiller(Net(4).float(), teacher, Seen(), layers)
    distiller(FLOAT)
    # Weights of 8 bits are stored so, and nothing is computed in them.
    assert teacher.seen.dtype == (torch.float64 if other == torch.float8_e5m2 else torch.float32)


class Bare(nn.Module):
    """A teacher without weights."""

    def forward(self, batch):
        self.seen = batch
        return batch


def test_several_devices_are_none_and_offloaded_weights_are_nowhere():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert home(model) == (cpu, torch.float32)
    model[0].to(meta)
    assert home(model) == (cpu, torch.float32)
    model.to(meta)
    assert home(model) == (None, torch.float32)
    assert home(nn.Identity()) == (None, None)


def test_a_teacher_on_the_meta_device_is_an_error_for_a_student_with_values():
    teacher = Net(6).to("meta")
    view = {"teacher_forward": lambda model, batch: model(batch.to("meta"))}
    mentions = "`layers['c1']`", "must have values in the teacher", "the meta device"
    raises(ValueError, lambda: build(teacher=teacher, **view)(images()), *mentions)
    build(Net(4).to("meta"), teacher)(images().to("meta"))


def test_arguments_of_any_dtype_are_moved():
    batch = [FLOAT, COUNTS, "text", {"pixels": [FLOAT]}]
    moved = placed(batch, torch.device("meta"), None)
    assert moved[3]["pixels"][0].is_meta
    assert [value.device.type for value in moved[:2]] == ["meta", "meta"]
    assert [value.dtype for value in moved[:2]] == [torch.float32, torch.int64]
    assert moved[2] == "text"


@pytest.mark.parametrize("shared_input", [None, "0", ""])
def test_the_teachers_input_comes_on_its_device(shared_input):
    with FakeTensorMode():  # has a GPU's shapes and devices without one
        student, teacher = (
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False, device="meta")) for _ in range(2)
        )
        for model, device in ((student, "cpu"), (teacher, "cuda")):
            # torch 2.4 would ask a real one for the random numbers of a start.
            model[0].weight = nn.Parameter(torch.empty(4, 3, 3, 3, device=device))
        distiller = Distiller(student, teacher, Seen(), {"c1": "0"}, shared_input=shared_input)
        seen = Inputs(teacher[0])
        distiller(torch.ones(2, 3, 8, 8))
        assert (seen[0].device.type, distiller.loss.teacher["c1"].device.type) == ("cuda", "cpu")


def test_a_part_without_weights_takes_the_shared_input_as_it_is():
    teacher = Bare()
    layers = {"c1": ("backbone.c1", "")}
    distiller = Distiller(Net(4).float(), teacher, Seen(), layers, shared_input=("backbone", ""))
    distiller(FLOAT)
    assert torch.equal(teacher.seen, FLOAT)


class Offloaded(nn.Module):
    """Its weights are elsewhere, and would be fetched by a hook."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, batch):
        return batch


def test_an_offloaded_part_takes_the_shared_input_where_it_is():
    layers = {"c1": ("backbone.c1", "")}
    distiller = build(Net(4).float(), Offloaded(), layers=layers, shared_input=("backbone", ""))
    distiller(FLOAT)
    assert torch.equal(distiller.loss.teacher["c1"], FLOAT)


def test_a_shared_tensor_of_integers_stays_one():
    class Embeds(Net):
        def __init__(self, width):
            super().__init__(width)
            self.backbone = nn.Sequential(nn.Embedding(3, 3), AsChannelsFirst(), *self.backbone)
            self.double()

    layers = {"c1": "backbone.2"}
    distiller = Distiller(Embeds(4), Embeds(6).float(), Seen(), layers, shared_input="backbone")
    distiller(torch.zeros(2, 8, 8, dtype=torch.long))
    assert distiller.loss.teacher["c1"].dtype == torch.float32


class AsChannelsFirst(nn.Module):
    def forward(self, maps):
        return maps.movedim(-1, 1)
