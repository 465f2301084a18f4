"""Misuse of a distiller, and advice that works."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from featkd import Distiller, FeatureDistillationLoss
from tests.helpers.distilled import HF_STAGES, TERM, Inputs, Seen, build, from_stage, make, pixels
from tests.helpers.models import (
    LEVELS,
    Net,
    detector,
    detector_images,
    detector_targets,
    detr,
    distillation_loss,
    images,
    raises,
    rt_detr,
)

# --- advice that works ----------------------------------------------------------------------------


def test_models_that_resize_images_are_sent_to_shared_input():
    student, teacher = detector("ssdlite").train(), detector("mobilenet")
    channels = {"c3": 40}, {"c3": 40}
    layers = {"c3": ("backbone.features.0.6", "backbone.body.6")}
    loss = FeatureDistillationLoss(*channels, hyperparameters=TERM)
    batch = detector_images(), detector_targets()
    raises(ValueError, lambda: Distiller(student, teacher, loss, layers)(*batch), "`shared_input`")
    distiller = Distiller(student, teacher, loss, layers, shared_input="backbone")
    assert distiller(*batch)[1]["loss_attention_masked"] > 0


class Masked(Net):
    """Its backbone takes a mask that can be left out."""

    def __init__(self, width):
        super().__init__(width)
        self.backbone = MaskedBackbone(self.backbone)

    def forward(self, batch):
        return self.head(self.backbone(batch, torch.ones(1)))


class MaskedBackbone(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = stages

    def forward(self, batch, mask=None):
        return self.stages(batch)


def test_the_advice_for_one_of_several_inputs_works():
    student, teacher = Masked(4), Masked(6)
    make_it = partial(Distiller, student, teacher, Seen(), {"c1": "backbone.stages.c1"})
    with pytest.raises(ValueError, match=re.escape("such as 'backbone:input[KEY]'")):
        make_it(shared_input="backbone")(images())
    theirs = Inputs(teacher.backbone)
    for advised in ("backbone:input[0]", ("backbone:input[0]", "backbone")):
        make_it(shared_input=advised)(images())
        assert torch.equal(theirs.pop(), images())


class TakesTwo(nn.Module):
    """Its own parts take one or two tensors, the nearest of the former not first."""

    def __init__(self, stages, depth=1):
        super().__init__()
        if depth:
            self.a = TakesTwo(nn.Identity(), depth - 1)
        self.stages = stages

    def forward(self, batch, mask):
        return self.stages(batch)


class OfTwo(Net):
    def __init__(self, width):
        super().__init__(width)
        self.backbone = TakesTwo(self.backbone)

    def forward(self, batch):
        return self.head(self.backbone(batch, None))


class NoneOfOne(nn.Module):
    def forward(self, batch, mask):
        return batch


@pytest.mark.parametrize(
    ("model", "path", "advice"),
    [
        (OfTwo(4), "backbone", ": try 'backbone.stages'."),
        (OfTwo(4).backbone, "", ": try 'stages'."),
        (NoneOfOne(), "", "."),
    ],
)
def test_a_part_that_takes_two_arguments_is_an_error_with_the_nearest_of_one(model, path, advice):
    said = f"takes one tensor, got {path!r}, which takes batch and mask{advice}"
    teacher = copy.deepcopy(model)
    raises(ValueError, lambda: build(model, teacher, layers={"c": path}, shared_input=path), said)


def test_a_part_of_the_student_that_takes_two_arguments_is_named_by_its_own_path():
    layers, paths = {"c": ("backbone.stages", "backbone")}, ("backbone", "backbone.c1")
    said = "takes one tensor, got 'backbone', which"
    raises(ValueError, lambda: build(OfTwo(4), Net(6), layers=layers, shared_input=paths), said)


class Options(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = stages

    def forward(self, batch, *rest, **options):
        return self.stages(batch)


def test_arguments_that_can_be_left_out_are_none():
    student, teacher = Net(4), Net(6)
    for model in (student, teacher):
        model.backbone = Options(model.backbone)
    distiller = build(
        student, teacher, layers={"c1": "backbone.stages.c1"}, shared_input="backbone"
    )
    distiller(images())
    assert distiller.loss.teacher["c1"].shape == (2, 6, 8, 12)


def test_a_conversion_to_no_tensor_is_an_error():
    distiller = build(shared_input="backbone", convert_input=lambda shared: [shared])
    said = "`convert_input` must return a tensor, got list."
    raises(TypeError, lambda: distiller(images()), said)


@pytest.mark.model_zoo
@pytest.mark.parametrize("build_model", [detr, rt_detr])
def test_the_advice_for_a_part_that_takes_two_arguments_works(build_model):
    student, teacher = (build_model(8, 8, 16, 16).requires_grad_(True) for _ in range(2))
    make_it = partial(Distiller, student, teacher, Seen(), HF_STAGES)
    with pytest.raises(ValueError, match="pixel_values and pixel_mask") as caught:
        make_it(shared_input="model.backbone")
    advice = re.search("try '(.*)'", str(caught.value))[1]
    distiller = make_it(shared_input=advice)
    distiller(*pixels)
    assert distiller.loss.teacher.keys() == HF_STAGES.keys()


# --- misuse ---------------------------------------------------------------------------------------


TWICE = Net(4)
MISUSE = {
    "student": (TypeError, lambda: build(student="net"), "`student`"),
    "teacher": (TypeError, lambda: build(teacher=print), "`teacher`"),
    "loss": (TypeError, lambda: build(loss=print), "`loss`"),
    "one model": (
        ValueError,
        lambda: build(student=TWICE, teacher=TWICE),
        "`teacher` must share no weights with `student`, got the same module.",
    ),
    "DataParallel student": (TypeError, lambda: build(nn.DataParallel(Net(4))), "DataParallel"),
    "DataParallel teacher": (
        TypeError,
        lambda: build(teacher=nn.DataParallel(Net(6))),
        "DataParallel",
    ),
    "a list of layers": (TypeError, lambda: build(layers=["backbone.c1"]), "list"),
    "a triple": (TypeError, lambda: build(layers={"c1": ("a", "b", "c")}), "layers['c1']"),
    "a number": (TypeError, lambda: build(layers={"c1": 3}), "got 3"),
    "no layers": (ValueError, lambda: build(layers={}), "[]"),
    "unknown in the student": (
        ValueError,
        lambda: build(layers={"c1": ("backbone.c3", "backbone.c1")}),
        "'backbone.c1'",
    ),
    "unknown in the teacher": (
        ValueError,
        lambda: build(layers={"c1": ("backbone.c1", "backbone.c3")}),
        "'backbone.c1'",
    ),
    "levels of another loss": (
        ValueError,
        lambda: build(loss=distillation_loss(), layers={"c1": "backbone.c1"}),
        "['c1', 'c2']",
    ),
    "shared_input of another type": (TypeError, lambda: build(shared_input=1), "`shared_input`"),
    "shared_input unknown": (ValueError, lambda: build(shared_input="bone"), "'bone'"),
    "shared_input unknown in the teacher": (
        ValueError,
        lambda: build(shared_input=("backbone", "bone")),
        "'bone'",
    ),
    "a layer beside shared_input": (
        ValueError,
        lambda: build(layers={"head": "head"}, shared_input="backbone"),
        "'head'",
    ),
    "teacher_forward of another type": (
        TypeError,
        lambda: build(teacher_forward="forward"),
        "`teacher_forward`",
    ),
    "convert of another type": (TypeError, lambda: build(convert=from_stage), "`convert`"),
    "convert of an unknown level": (ValueError, lambda: build(convert={"c3": None}), "'c3'"),
    "convert to None": (TypeError, lambda: build(convert={"c1": None}), "`convert['c1']`"),
    "convert to a triple": (
        TypeError,
        lambda: build(convert={"c1": (None,) * 3}),
        "`convert['c1']`",
    ),
    "convert to no function": (
        TypeError,
        lambda: build(convert={"c1": ("NHWC", None)}),
        "`convert['c1']`",
    ),
    "early_stop of another type": (TypeError, lambda: build(early_stop=1), "`early_stop`"),
    "shared_input and teacher_forward": (
        ValueError,
        lambda: build(shared_input="backbone", teacher_forward=print),
        "`shared_input` must be None where `teacher_forward` is given, got 'backbone'",
    ),
}


@pytest.mark.parametrize(("error", "call", "mention"), MISUSE.values(), ids=MISUSE)
def test_misuse(error, call, mention):
    raises(error, call, mention)


def test_a_wholly_frozen_student_is_an_error():
    distiller = make()
    distiller.student.requires_grad_(False)
    said = (
        f"must carry a gradient each, got frozen parts of the student at {list(LEVELS)}: unfreeze"
    )
    raises(RuntimeError, lambda: distiller(images()), said)
    raises(RuntimeError, lambda: distiller.report(images()), said)
    distiller.student.backbone.c2.requires_grad_(True)
    raises(
        RuntimeError, lambda: distiller(images()), "got none at {'c1': 'backbone.c1'}: parameters"
    )


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ("c1", "the student, a Net, got 'c1' (close: "),
        (("backbone.c1", "of_neither"), "the teacher, a Sequential, got 'of_neither'."),
        (
            "backbone.c1",
            "got 'backbone.c1' (close: '0.backbone.c1'), a path of the student: a (student",
        ),
        ("0.backbone.c1", "), a path of the teacher: a (student path, teacher path) pair names"),
        (
            ("0.backbone.c1", "backbone.c1"),
            "a path of the teacher: the student comes first, in each pair and before the teacher.",
        ),
    ],
)
def test_a_wrong_path_is_an_error_that_says_whose(paths, said):
    models = Net(4), nn.Sequential(Net(6))
    raises(ValueError, lambda: Distiller(*models, Seen(), {"c1": paths}), "`layers['c1']`", said)


class NormalizesInPlace(Net):
    def forward(self, images):
        return super().forward(images.sub_(0.5).div_(0.25))


def test_a_student_that_changes_the_teacher_s_images_is_an_error_whose_advice_works():
    student = NormalizesInPlace(4)
    said = (
        "in-place change of those of shape (2, 3, 16, 24)",
        "take `shared_input`, or a `student_f",
    )
    raises(RuntimeError, lambda: build(student, Net(6))(images()), "`student` must leave", *said)
    batch = images()
    teacher = Net(6)
    seen = Inputs(teacher)
    build(student, teacher, student_forward=lambda model, x: model(x.clone()))(batch)
    assert torch.equal(seen[0], batch)


class NormalizesTheList(Net):
    def forward(self, images):
        for index, image in enumerate(images):
            images[index] = (image - 0.5) / 0.25
        return super().forward(torch.stack(images))


class OfAList(Net):
    def forward(self, images):
        return super().forward(torch.stack(images))


def test_a_student_that_puts_other_images_into_the_teacher_s_list_is_an_error_whose_advice_works():
    student, teacher = NormalizesTheList(4), OfAList(6)
    said = "others in place of those of shape (3, 16, 24)", "a `student_forward` that calls"
    raises(RuntimeError, lambda: build(student, teacher)([*images()]), *said)
    seen = Inputs(teacher.backbone)
    batch = [*images()]
    build(student, teacher, student_forward=lambda model, x: model([*x]))(batch)
    assert torch.equal(seen[0], torch.stack(batch))


def test_a_part_that_runs_twice_is_no_shared_input():
    def twice(model, x):
        model.backbone(x)
        return model(x)

    distiller = make(student_forward=twice, shared_input="backbone")
    raises(RuntimeError, lambda: distiller(images()), "`shared_input`", "got 2 runs of 'backbone")


def test_features_that_convert_detaches_are_an_error_that_says_so():
    distiller = make(convert=dict.fromkeys(LEVELS, torch.detach))
    raises(RuntimeError, lambda: distiller(images()), "or `convert` detaches them")


def test_a_student_under_reentrant_checkpointing_is_an_error_that_says_so():
    distiller = make(student_forward=partial(checkpoint, use_reentrant=True))
    said = "`layers`", "reentrant checkpointing (take `use_reentrant=False`)"
    raises(RuntimeError, lambda: distiller(images().requires_grad_()), *said)


@pytest.mark.parametrize("name", ["student", "teacher", "loss"])
def test_another_model_or_loss_wants_another_distiller(name):
    distiller = make()
    kept = getattr(distiller, name)
    with pytest.raises(AttributeError, match=f"`{name}` must stay: make a new Distiller"):
        setattr(distiller, name, getattr(make(), name))
    with pytest.raises(AttributeError, match=f"`{name}` must stay"):
        setattr(distiller, name, None)
    assert getattr(distiller, name) is kept


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_a_wrapper_of_the_student_or_the_loss_may_take_its_place():
    distiller = make()
    distiller.student, distiller.loss = Wrapped(distiller.student), Wrapped(distiller.loss)
    assert distiller(images())[1]


def sharing(**parts):
    """A distiller whose teacher has these submodules of the student's or the loss's."""
    student, teacher, loss = Net(4), Net(4), distillation_loss(4, 4)
    owner = {"student": student, "loss": loss}
    for name, path in parts.items():
        teacher.add_module("shared", owner[name].get_submodule(path))
    return Distiller(student, teacher, loss, LEVELS)


@pytest.mark.parametrize("path", ["", "backbone.c1"])
def test_a_teacher_that_holds_the_student_or_a_part_of_it_is_an_error(path):
    first = next(
        f"{path}.{name}".lstrip(".") for name, _ in Net(4).get_submodule(path).named_parameters()
    )
    with pytest.raises(ValueError, match=f"share no weights with `student`, got '{first}' in both"):
        sharing(student=path)


def test_a_teacher_that_the_loss_trains_is_an_error():
    with pytest.raises(ValueError, match="`teacher` must share no weights with `loss`"):
        sharing(loss="attention_masked")


def test_a_student_that_fsdp_wraps_alone_is_an_error():
    student = nn.Module()
    student._fsdp_wrapped_module = Net(4)
    said = (
        "`student` must not be wrapped by itself, as the parameters of `loss` would differ from "
        "process to process",
        "got Module: wrap the distiller, `Module(Distiller(...))`.",
    )
    raises(ValueError, lambda: build(student, loss=distillation_loss()), *said)
    build(student)
    build(student, loss=distillation_loss().requires_grad_(False))
    loss = nn.Module()
    loss._fsdp_wrapped_module = distillation_loss()
    build(student, loss=loss)


def test_a_student_that_ddp_wraps_alone_is_an_error():
    student = DistributedDataParallel.__new__(DistributedDataParallel)  # without processes
    nn.Module.__init__(student)
    student.module = Net(4)
    said = "wrap the distiller, `DistributedDataParallel(Distiller(...))`."
    raises(ValueError, lambda: build(student, loss=distillation_loss()), said)


def test_a_shared_buffer_is_an_error():
    student, teacher = Net(4), Net(4)
    for model in (student, teacher):
        model.register_buffer("average", torch.zeros(1) if model is student else student.average)
    with pytest.raises(ValueError, match="'average' in both"):
        build(student, teacher)


@pytest.mark.parametrize("way", ["assign", "data", "buffer"])
def test_weights_that_share_memory_are_an_error(way):
    student, teacher = Net(4), Net(4)
    if way == "assign":
        student.load_state_dict(teacher.state_dict(), assign=True)
    elif way == "data":
        student.head.weight.data = teacher.head.weight.data
    else:
        student.backbone.c1.norm.running_mean = teacher.backbone.c1.norm.running_mean.detach()
    with pytest.raises(ValueError, match=r"`teacher` must share no weights with `student`, got '"):
        build(student, teacher)


def test_a_loss_of_one_level_takes_any_name_for_it():
    from featkd import ONE_STAGE, FeatureDistillationLoss

    loss = FeatureDistillationLoss(8, 12, hyperparameters=ONE_STAGE).double()
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU()).double() for c in (8, 12))
    _, losses = Distiller(student, teacher, loss, {"anything": "1"})(images())
    assert losses["loss_attention_masked"] > 0
    with pytest.raises(ValueError, match="`layers` must have the levels of `loss`"):
        Distiller(student, teacher, loss, {"a": "0", "b": "1"})
