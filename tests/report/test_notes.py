"""What a report notes, and what is logged at the first use."""

import copy
import dataclasses
import logging
import math
import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from featkd import STANDARDIZED, TWO_STAGE, Distiller, FeatureDistillationLoss
from featkd.report.magnitudes import magnitudes
from featkd.report.models import same_weights
from featkd.report.report import AIM
from tests.helpers.models import LEVELS, Net, distillation_loss, images, raises
from tests.helpers.reported import MASKED, Ratio, Student, Summed, Term, make

# --- notes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_parameters_that_no_optimizer_holds_are_noted(kind):
    distiller = make()
    make_optimizer = getattr(torch.optim, kind)
    for part in ("student", "loss"):
        optimizer = make_optimizer(
            getattr(distiller, "loss" if part == "student" else "student").parameters(), 0.1
        )
        (note,) = [n for n in distiller.report(images(), optimizer=optimizer).notes if "optim" in n]
        assert re.match(rf"[\d,]+ parameters in \d+ tensors \(such as '{part}\.", note)
        said = "of the optimizer, and are not trained: give it `distiller.parameters()`."
        assert note.endswith(said)
    optimizer = make_optimizer(distiller.parameters(), 0.1)
    assert len(distiller.report(images(), optimizer=optimizer).notes) == 1


def test_the_note_counts_what_is_left_out():
    distiller = make()
    held, *left_out = [value for value in distiller.loss.parameters() if value.requires_grad]
    count = sum(value.numel() for value in left_out)
    groups = [{"params": distiller.student.parameters()}, {"params": [held]}]
    notes = distiller.report(images(), optimizer=torch.optim.SGD(groups, 0.1)).notes
    assert notes[1].startswith(f"{count:,} parameters in {len(left_out)} tensors")


RATIOS = [(0.0044, "is 0.0044 times"), (0.5, "is 0.5 times"), (4.0, "is 4 times")]


@pytest.mark.parametrize(("ratio", "said"), RATIOS)
def test_the_weights_are_judged_by_the_gradient_and_not_by_the_size_of_the_loss(ratio, said):
    distiller = Distiller(Summed(4), Net(6), Ratio(ratio, 1e6), {"c1": "backbone.c1"})
    report = distiller.report(images())
    assert report.distillation.gradient_ratio == pytest.approx(ratio)
    (note,) = report.notes
    assert note == f"The distillation's gradient {said} the detector's. {AIM}"


@pytest.mark.parametrize(
    ("strides", "notes"),
    [
        (
            (8, 16),
            [
                "Level 'c1' pairs a student's stride of 8 with a teacher's of 16: take layers of "
                "one stride, as `match_layers` does."
            ],
        ),
        ((14, 16), []),
        ((16, 16), []),
    ],
)
def test_a_pair_of_two_levels_is_noted_which_a_resize_would_bridge(strides, notes):
    ours, theirs = (
        nn.Conv2d(3, channels, stride, stride)
        for channels, stride in zip((4, 6), strides, strict=True)
    )
    loss = FeatureDistillationLoss({"c1": 4}, {"c1": 6}, resize="bilinear")
    report = Distiller(ours, theirs, loss, {"c1": ""}).report(torch.randn(2, 3, 112, 112))
    assert [note for note in report.notes if "stride" in note] == notes


@pytest.mark.parametrize(("size", "positions"), [((1, 1), 1), ((1, 2), 2), ((1, 3), 3)])
def test_a_level_that_standardised_teaches_nothing_is_noted(size, positions):
    ours, theirs = nn.Conv2d(3, 4, 8, 8).double(), nn.Conv2d(3, 6, 8, 8).double()
    image = torch.randn(2, 3, 8 * size[0], 8 * size[1], dtype=torch.float64)
    for preset in (STANDARDIZED, TWO_STAGE):
        loss = FeatureDistillationLoss({"p7": 4}, {"p7": 6}, preset).double()
        report = Distiller(ours, theirs, loss, {"p7": ""}).report(image)
        said = [note for note in report.notes if note.startswith("Level 'p7' has")]
        assert bool(said) == (positions < 3 and preset is STANDARDIZED)
        assert (report.distillation.gradient_norm < 1e-6) == bool(said)


def test_one_position_is_enough_where_channel_attention_is_compared():
    settings = dataclasses.replace(STANDARDIZED, alpha=1.0)
    for part in ("both", "channel", "spatial"):
        of_part = dataclasses.replace(settings, transfer_attention=part)
        loss = FeatureDistillationLoss({"p7": 4}, {"p7": 6}, of_part)
        distiller = Distiller(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(3, 6, 8, 8), loss, {"p7": ""})
        report = distiller.report(torch.randn(2, 3, 8, 8))
        said = any(note.startswith("Level 'p7' has") for note in report.notes)
        assert said == (part == "spatial")
        assert (report.distillation.gradient_norm < 1e-4) == said


@pytest.mark.parametrize("way", ["another view", "another kind of module"])
def test_a_teacher_of_the_same_weights_that_sees_or_computes_otherwise_can_teach(way):
    student, options = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), {}
    teacher = copy.deepcopy(student)
    if way == "another view":
        options["teacher_forward"] = lambda model, images: model(images.flip(3))
    else:
        student[0].__class__ = type("Quantised", (nn.Conv2d,), {})
    loss = FeatureDistillationLoss({"c1": 4}, {"c1": 4})
    report = Distiller(student, teacher, loss, {"c1": ""}, **options).report(
        torch.randn(2, 3, 9, 9)
    )
    assert not [note for note in report.notes if "weights are the student's" in note]


def test_a_copy_of_the_student_as_teacher_is_noted_whatever_its_batch_norm_does():
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    teacher = copy.deepcopy(student)
    loss = FeatureDistillationLoss({"c1": 4}, {"c1": 4})
    distiller = Distiller(student, teacher, loss, {"c1": ""})
    said = "The teacher's weights are the student's: it has nothing to teach."
    assert said in distiller.report(torch.randn(2, 3, 9, 9)).notes
    offloaded = copy.deepcopy(student).to("meta")
    assert list(same_weights(student, teacher))
    assert not list(same_weights(student, offloaded))
    with torch.no_grad():
        teacher[0].bias += 1e-3
    assert said not in distiller.report(torch.randn(2, 3, 9, 9)).notes


IN_EVAL_MODE = "the student is in `eval` mode where it is to be trained: `distiller.train()`."


def test_a_student_in_eval_mode_in_training_is_logged_at_whatever_step_once(caplog):
    distiller = make(Student())
    distiller(images())
    assert not caplog.records
    distiller.student.eval()
    for _ in range(2):
        distiller(images())
    assert messages(caplog, logging.WARNING) == [IN_EVAL_MODE]
    assert IN_EVAL_MODE.replace("the", "The", 1) in distiller.report(images()).notes
    distiller.train()
    assert not [note for note in distiller.report(images()).notes if "eval" in note]


def test_a_student_that_trains_beside_a_distiller_in_eval_mode_is_logged_once(caplog):
    distiller = make(Student()).eval()
    distiller.student.train()
    with torch.no_grad():  # a validation loss
        distiller(images())
    assert not caplog.records
    for _ in range(2):
        assert distiller(images())[1] == {}
    assert messages(caplog, logging.WARNING) == [
        "the distiller is in `eval` mode, the student trains and is not taught: "
        "`distiller.train()`."
    ]


def test_the_first_training_step_says_what_a_report_would_without_a_backward(caplog):
    ours, theirs = nn.Conv2d(3, 32, 8, 8), nn.Conv2d(3, 6, 16, 16)
    loss = FeatureDistillationLoss({"p7": 32}, {"p7": 6}, resize="bilinear")
    distiller = Distiller(ours, theirs, loss, {"p7": ""})
    image = torch.randn(2, 3, 16, 16)
    expected = [note for note in distiller.report(image).notes if not note.startswith("The det")]
    distiller(image)
    said = messages(caplog, logging.WARNING)
    assert [text[0].upper() + text[1:] for text in said] == expected
    starts = "level 'p7' pairs", "level 'p7' has", "the dist", "the student has"
    for text, start in zip(said, starts, strict=True):
        assert text.startswith(start)


def weights_times(factor):
    def change(teacher, student):
        for value in teacher.backbone.parameters():
            value.mul_(factor)

    return change


def constant(teacher, student):
    for level in teacher.backbone:
        level.conv.weight.zero_()
        level.norm.bias.fill_(0.5)


def tiny(teacher, student):
    for level in teacher.backbone:
        level.norm.weight.mul_(1e-9)
    teacher.backbone.c2.conv.weight.mul_(1e9)


STATES = {
    "zero": (weights_times(0.0), "are zero: "),
    "not finite": (weights_times(math.nan), "are not finite: "),
    "infinite": (weights_times(math.inf), "are not finite: "),
    "constant": (constant, "are the same at every position: "),
    "huge": (
        weights_times(1e9),
        "have an absurd size (root mean square outside 1e-06 to 1000): its weights were not "
        "loaded, or its batch normalisations never saw data.",
    ),
    "tiny": (tiny, "have an absurd size "),
}


@pytest.mark.parametrize(("change", "said"), STATES.values(), ids=STATES)
def test_a_teacher_that_cannot_teach_is_noted_and_logged_once(change, said, caplog):
    distiller = make(Student(), MASKED)
    with torch.no_grad():
        change(distiller.teacher, distiller.student)
    report = distiller.report(images())
    assert not caplog.records
    (note,) = [note for note in report.notes if "teacher's features" in note]
    assert note.startswith(f"The teacher's features at c1, c2 {said}")
    assert f"\n\n{note}" in str(report)
    for _ in range(2):
        distiller(images())
    logged = [text for text in messages(caplog, logging.WARNING) if "teacher's" in text]
    assert logged == ["t" + note[1:]]


@pytest.mark.parametrize(
    ("widths", "kind", "noted"),
    [
        ((6, 4), Net, "the student comes first."),
        ((4, 6), Net, None),
        ((6, 4), Student, "the student comes first if they are swapped."),
        ((4, 6), Student, None),
    ],
)
def test_a_student_larger_than_its_teacher_is_noted(widths, kind, noted):
    student, teacher = kind(widths[0]), Net(widths[1])
    distiller = Distiller(student, teacher, distillation_loss(*widths, MASKED), LEVELS)
    notes = [note for note in distiller.report(images()).notes if "parameters, the teacher" in note]
    assert len(notes) == (noted is not None)
    assert all(note.endswith(noted) for note in notes)


def test_a_teacher_that_shows_no_parameter_is_not_called_smaller():
    teacher = Net(6)
    for module in teacher.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, value.detach())
    distiller = Distiller(Net(4), teacher, distillation_loss(4, 6, MASKED), LEVELS)
    assert "parameters, the teacher" not in str(distiller.report(images()))


def test_a_teacher_that_equals_the_student_is_noted():
    student, teacher = Net(4).eval(), Net(4)
    teacher.load_state_dict(student.state_dict())
    distiller = Distiller(student, teacher, distillation_loss(4, 4, MASKED), LEVELS)
    said = "are the student's own: it has the same weights, and nothing to teach."
    assert f"The teacher's features at c1, c2 {said}" in distiller.report(images()).notes
    student.backbone.c2.conv.weight.data.mul_(2.0)
    assert f"The teacher's features at c1 {said}" in distiller.report(images()).notes
    student.train()
    assert not [note for note in distiller.report(images()).notes if "teacher's" in note]


@pytest.mark.parametrize(
    ("features", "fault"),
    [
        (torch.ones(2, 3, 1, 1), "same at every"),
        (torch.ones(1, 3, 1, 1), ""),
        (torch.full((2, 3, 4, 4), 1e-6), "same at every"),
        (torch.full((2, 3, 4, 4), 1e-3).half(), "same at every"),
        (torch.arange(96.0).view(2, 3, 4, 4), ""),
        (torch.arange(96.0).flip(0).view(2, 3, 4, 4), ""),
        (torch.arange(96.0).view(2, 3, 4, 4) - 5e4, "absurd"),
        (torch.arange(96.0).view(2, 3, 4, 4).half() * 1e-3, ""),
        (torch.arange(96.0).view(2, 3, 4, 4).half() * 600, "absurd"),
        (torch.arange(96.0).view(2, 3, 4, 4) * 1e30, "absurd"),
        (torch.tensor([1e3, -1e3] * 8).view(2, 2, 2, 2).mT, ""),
        (torch.tensor([1e-6, -1e-6] * 8, dtype=torch.float64).view(2, 2, 2, 2), ""),
        (torch.tensor([[1.0, 2.0], [1.0, 3.0]]), ""),
        (torch.tensor([[1.0, 2.0], [1.0, 2.0]]), "same at every"),
        (torch.ones(0, 3, 4, 4), ""),
        (torch.ones(2, 3, 4, 4, device="meta"), ""),
    ],
)
def test_what_is_wrong_with_a_teacher(features, fault):
    found = magnitudes({"c": torch.zeros(1)}, {"c": features})["c"]
    assert fault in found.fault
    assert bool(fault) == bool(found.fault)
    if features.numel() and not features.is_meta:
        assert found.teacher == pytest.approx(features.double().square().mean().sqrt().item())
    else:
        assert found.teacher is None


def test_a_teacher_that_equals_a_student_of_another_dtype_is_noted():
    values = torch.arange(96.0).view(2, 3, 4, 4) / 7
    assert "student's own" in magnitudes({"c": values.half()}, {"c": values})["c"].fault


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: {"term": x.sum() * math.nan}, "the term 'term' is nan: a step with it spoils"),
        (lambda x: {"term": x.sum() * math.inf}, "the term 'term' is inf: a step with it spoils"),
        (
            lambda x: {"term": x.detach().square().mean()},
            "the term 'term' has no gradient to the student's",
        ),
        (lambda x: {"term": 0 * x.sum()}, "the distillation loss is 0: nothing is distilled."),
        (lambda x: {}, "the distillation loss is 0: nothing is distilled."),
    ],
    ids=["NaN", "inf", "detached", "zero", "no term"],
)
def test_a_loss_that_trains_nothing_is_noted(function, text):
    distiller = Distiller(Student(), Net(6), Term(function), {"c1": "backbone.c1"})
    report = distiller.report(images())
    assert report.notes[-1].startswith(text[0].upper() + text[1:])
    assert str(report).endswith("".join(f"\n\n{said}" for said in report.notes))


def test_an_optimizer_of_another_kind_is_an_error():
    distiller = make()
    raises(TypeError, lambda: distiller.report(images(), optimizer=[]), "`optimizer`", "list")


# --- first use ------------------------------------------------------------------------------------


def messages(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_the_first_training_step_logs_the_levels_once(caplog):
    caplog.set_level(logging.INFO, "featkd")
    distiller = make()
    distiller.eval()(images())
    assert not caplog.records
    distiller.train()
    for _ in range(3):
        distiller(images())
    (text,) = messages(caplog, logging.INFO)
    assert text == "Distilling\n" + str(distiller.report(images())).split("\n\n")[0]
    assert len(caplog.records) == 1


def test_of_several_processes_the_first_alone_logs(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "featkd")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        distiller = make(Student(), MASKED)
        with torch.no_grad():
            weights_times(0.0)(distiller.teacher, distiller.student)
        distiller(images())
        assert len(caplog.records) == (0 if rank else 2)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_nothing_is_said_of_a_sound_step_whatever_the_detectors_loss(scale, capfd):
    make(Student(scale=scale))(images())
    assert capfd.readouterr() == ("", "")


def test_the_first_training_step_says_that_a_loss_is_not_finite(caplog):
    loss = Term(lambda x: {"term": x.sum() * math.nan})
    distiller = Distiller(Student(), Net(6), loss, {"c1": "backbone.c1"})
    for _ in range(2):
        distiller(images())
    assert messages(caplog, logging.WARNING) == [
        "the term 'term' is nan: a step with it spoils every weight."
    ]


def no_value_is_read(monkeypatch):
    for name in ("item", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor: pytest.fail("read"))
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("read"))


def test_a_silenced_logger_costs_no_reading_of_values(monkeypatch):
    distiller = make()
    monkeypatch.setattr(logging.getLogger("featkd"), "disabled", True)
    no_value_is_read(monkeypatch)
    distiller(images())


def test_values_are_read_at_the_first_step_alone(monkeypatch):
    distiller = make()
    distiller(images())
    no_value_is_read(monkeypatch)
    distiller(images())


def test_without_values_the_first_step_says_nothing(caplog):
    class Mean(nn.Module):
        def forward(self, student, teacher):
            return {"mean": student["c1"].mean()}

    models = [model.to("meta") for model in (Student(), Net(6))]
    distiller = Distiller(*models, Mean(), {"c1": "backbone.c1"})
    distiller(images().to("meta"))
    assert not caplog.records


@pytest.mark.one_graph
def test_a_compiled_distiller_says_nothing_and_stays_one_graph(caplog, fresh_compiler):
    caplog.set_level(logging.INFO, "featkd")
    distiller = make(Net(4))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(distiller, fullgraph=True, backend=counter)
    distiller.teacher.eval()
    for _ in range(2):
        compiled(images())
    assert counter.frame_count == 1
    assert not [record for record in caplog.records if record.name == "featkd"]
