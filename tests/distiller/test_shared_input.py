"""What enters a part of the student enters the same part of the teacher."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from featkd import Distiller
from tests.helpers.distilled import HasTrunk, Inputs, Seen, make
from tests.helpers.models import (
    LEVELS,
    Net,
    detector,
    detector_images,
    detector_targets,
    distillation_loss,
    images,
)
from tests.helpers.tensors import close


def resizing(name, seed):
    torch.manual_seed(seed)
    return detector(name, min_size=(48, 64, 80, 96), max_size=128)


@pytest.mark.parametrize(
    ("name", "head", "layers"),
    [
        ("mobilenet", "rpn", {"c3": "backbone.body.6"}),
        ("retinanet", "head", {"c3": "backbone.body.layer2"}),
    ],
)
def test_a_detector_that_resizes_at_random_gives_its_pixels_to_the_teachers_backbone(
    name, head, layers
):
    student, teacher = resizing(name, 1).train(), resizing(name, 2)
    distiller = Distiller(student, teacher, Seen(), layers, shared_input="backbone")
    ours, theirs = Inputs(student.backbone), Inputs(teacher.backbone)
    rest = Inputs(teacher.transform), Inputs(teacher.get_submodule(head))
    for _ in range(6):
        distiller(detector_images(), detector_targets())
        assert distiller.loss.student["c3"].shape == distiller.loss.teacher["c3"].shape
    assert len({tensor.shape for tensor in ours}) > 1
    assert all(map(torch.equal, ours, theirs))
    assert len(theirs) == 6
    assert not any(rest)


def test_the_shared_input_comes_in_the_dtype_of_the_part_that_runs():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.codes = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
            self.backbone = Net(6).backbone.bfloat16()

    distiller = Distiller(Net(4), HeadFirst(), Seen(), LEVELS, shared_input="backbone")
    ours, theirs = (Inputs(x.backbone) for x in (distiller.student, distiller.teacher))
    distiller(images())
    assert theirs[0].dtype == torch.bfloat16
    assert torch.equal(theirs[0], ours[0].bfloat16())


@pytest.mark.parametrize("wrap", [lambda teacher: teacher, AveragedModel], ids=["bare", "averaged"])
def test_the_shared_input_runs_that_part_of_the_teacher_alone(wrap):
    teacher = Net(6)
    distiller = Distiller(
        Net(4), wrap(teacher), distillation_loss(), LEVELS, shared_input="backbone"
    )
    teacher = getattr(distiller.teacher, "module", distiller.teacher)
    ours, theirs = Inputs(distiller.student.backbone), Inputs(teacher.backbone)
    head = Inputs(teacher.head)
    distiller(images())
    assert torch.equal(ours[0], theirs[0])
    assert not head


def test_the_shared_input_of_a_pair_of_paths():
    teacher = HasTrunk(6)
    layers = {level: (path, path.replace("backbone", "trunk")) for level, path in LEVELS.items()}
    pair = ("backbone", "trunk")
    distiller = Distiller(Net(4), teacher, distillation_loss(), layers, shared_input=pair)
    ours, theirs = Inputs(distiller.student.backbone), Inputs(teacher.trunk)
    distiller(images())
    assert torch.equal(ours[0], theirs[0])
    assert teacher.calls == 0


def test_a_teacher_that_is_a_bare_backbone():
    layers = {"c1": ("backbone.c1", "c1"), "c2": ("backbone.c2", "c2")}
    teacher = Net(6).backbone
    pair = ("backbone", "")
    distiller = Distiller(Net(4), teacher, distillation_loss(), layers, shared_input=pair)
    theirs = Inputs(teacher)
    distiller(images())
    assert torch.equal(theirs[0], images())


def test_the_output_of_the_shared_part_itself_can_be_tapped():
    layers = {"c1": "backbone.c1", "c2": "backbone"}
    distiller = Distiller(Net(4), Net(6), distillation_loss(), layers, shared_input="backbone")
    assert distiller(images())[1]["loss_non_local"] > 0


def test_teacher_forward_replaces_the_call():
    teacher = HasTrunk(6)
    layers = {level: (path, path.replace("backbone", "trunk")) for level, path in LEVELS.items()}

    def forward(model, batch, **options):
        assert model is teacher
        model.trunk(2 * batch)

    distiller = Distiller(Net(4), teacher, distillation_loss(), layers, teacher_forward=forward)
    theirs = Inputs(teacher.trunk)
    distiller(images())
    close(theirs[0], 2 * images(), 0.0)
    assert teacher.calls == 0


def test_with_neither_the_teacher_is_called_as_the_student_is():
    student, teacher = HasTrunk(4), HasTrunk(6)
    layers = {"c1": "trunk.c1", "c2": "trunk.c2"}
    distiller = Distiller(student, teacher, distillation_loss(), layers)
    inputs = Inputs(student.trunk), Inputs(teacher.trunk)
    distiller(images(), scale=3)
    for given in inputs:
        close(given[0], 3 * images(), 0.0)


def test_student_forward_and_teacher_forward_give_each_side_its_own():
    student, teacher = Net(4), Net(6)
    distiller = Distiller(
        student,
        teacher,
        distillation_loss(),
        LEVELS,
        student_forward=lambda model, batch, view, *, scale: model(scale * batch),
        teacher_forward=lambda model, batch, view, *, scale: model(view),
    )
    ours, theirs = Inputs(student), Inputs(teacher)
    view = images(seed=1)
    output, losses = distiller(images(), view, scale=3)
    assert torch.equal(ours[0], 3 * images())
    assert torch.equal(theirs[0], view)
    close(output, copy.deepcopy(student)(3 * images()), 0.0)
    report = distiller.report(images(), view, scale=3)
    assert torch.equal(theirs[1], view)
    assert {term.name: term.value for term in report.terms} == {
        name: value.item() for name, value in losses.items()
    }


def test_a_call_of_no_length_replaces_the_models_too():
    class Twice(nn.ModuleList):
        def forward(self, model, batch):
            return model(2 * batch)

    student, teacher = Net(4), Net(6)
    options = {"student_forward": Twice(), "teacher_forward": Twice()}
    build = partial(Distiller, student, teacher, distillation_loss(), LEVELS)
    found, expected = build(**options)(images())[1], build()(2 * images())[1]
    assert found == expected


def test_student_forward_alone_leaves_the_teachers_call_as_it_is():
    student, teacher = Net(4), HasTrunk(6)
    layers = {"c1": ("backbone.c1", "trunk.c1"), "c2": ("backbone.c2", "trunk.c2")}
    options = {"student_forward": lambda model, batch, scale: model(batch)}
    distiller = Distiller(student, teacher, distillation_loss(), layers, **options)
    theirs = Inputs(teacher.trunk)
    distiller(images(), 3)
    close(theirs[0], 3 * images(), 0.0)


def test_student_forward_beside_a_shared_input():
    distiller = make(shared_input="backbone", student_forward=lambda model, *args: model(args[1]))
    theirs = Inputs(distiller.teacher.backbone)
    distiller(None, images())
    assert torch.equal(theirs[0], images())
