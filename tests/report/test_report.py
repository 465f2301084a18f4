"""Distiller.report: its figures, and that it leaves no trace."""

import copy
import math
import random
import re
from contextlib import nullcontext
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from featkd import Distiller, FeatureDistillationLoss, FeatureTap, match_layers
from featkd._preserve import preserved
from featkd.report.detector_loss import detector_loss
from featkd.report.report import NO_DETECTOR_LOSS, _norm
from tests.helpers.models import (
    LEVELS,
    Net,
    detector,
    detector_images,
    detector_targets,
    distillation_loss,
    images,
    raises,
    snapshot,
    unchanged,
)
from tests.helpers.reported import MASKED, Ratio, Student, Summed, Term, make
from tests.helpers.tensors import close


def gradient_norm(value, model):
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None]).norm()


# --- the figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_the_levels(shared_input):
    distiller = make(shared_input=shared_input)
    first, second = distiller.report(images()).levels
    assert (first.name, first.student_path, first.teacher_path) == ("c1", *["backbone.c1"] * 2)
    assert (first.student_shape, first.teacher_shape) == ((2, 4, 8, 12), (2, 6, 8, 12))
    assert (first.student_stride, first.teacher_stride) == (2.0, 2.0)
    assert (second.student_stride, second.teacher_stride) == (4.0, 4.0)
    trained = [value for value in distiller.loss.parameters() if value.requires_grad]
    assert first.adapter_parameters > 0
    assert first.adapter_parameters + second.adapter_parameters == sum(p.numel() for p in trained)


class TakesAMask(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, mask, x):
        return self.model(x)


def test_a_small_mask_in_front_of_the_image_does_not_give_the_stride():
    models = TakesAMask(Net(4).backbone), TakesAMask(Net(4).backbone)
    loss = Term(lambda x: {"term": x.mean()})
    distiller = Distiller(*models, loss, {"c1": "model.c1"})
    mask, pixels = torch.ones(2, 1, 4, 6), torch.rand(2, 3, 16, 24).double()
    (level,) = distiller.report(mask, pixels).levels
    assert (level.student_stride, level.teacher_stride) == (2.0, 2.0)


def test_gradients_of_float16_whose_norm_overflows():
    """Of a student in float16: each is below 65,504, their norm is not."""
    gradient = torch.full((16,), 3e4, dtype=torch.float16)
    assert _norm([gradient, None]) == pytest.approx(1.2e5, rel=1e-3)


def test_the_size_of_the_features_is_before_the_adapters():
    distiller = make()
    distiller.loss.requires_grad_(False)
    for parameter in distiller.loss.parameters():
        parameter.mul_(100.0)
    with (
        FeatureTap(distiller.student, LEVELS) as ours,
        FeatureTap(distiller.teacher, LEVELS) as its,
    ):
        distiller(images())
        expected = [tap.pop() for tap in (ours, its)]
    for level in distiller.report(images()).levels:
        sizes = [side[level.name].square().mean().sqrt().item() for side in expected]
        assert [level.student_rms, level.teacher_rms] == pytest.approx(sizes, rel=1e-9)


def test_each_term_is_judged_by_its_gradient_beside_the_detectors():
    """On what the taps reach: not on the student's head, which the distillation never moves."""
    distiller = make()
    report = distiller.report(images())
    names = (
        "detector",
        "loss_attention_transfer",
        "loss_attention_masked",
        "loss_non_local",
        "distillation",
    )
    norms = {}
    for name in names:
        own, losses = distiller(images())
        everything = losses | {"detector": sum(own.values()), "distillation": sum(losses.values())}
        norms[name] = gradient_norm(everything[name], distiller.student.backbone).item()
        found = {"detector": report.detector, "distillation": report.distillation}
        term = found.get(name) or next(term for term in report.terms if term.name == name)
        assert term.value == pytest.approx(everything[name].item(), rel=1e-9)
        assert term.gradient_norm == pytest.approx(norms[name], rel=1e-9)
        assert term.gradient_ratio == pytest.approx(norms[name] / norms["detector"], rel=1e-9)
    assert tuple(term.name for term in report.terms) == names[1:-1]
    assert min(norms.values()) > 0


def test_frozen_parts_of_the_student_are_left_out():
    student = Student()
    student.backbone.c1.requires_grad_(False)
    loss = FeatureDistillationLoss(8, 12, hyperparameters=MASKED).double()
    distiller = Distiller(student, Net(6), loss, {"c2": "backbone.c2"})
    report = distiller.report(images())
    assert report.levels[0].adapter_parameters == 8 * 12 + 12
    _, losses = distiller(images())
    expected = gradient_norm(losses["loss_attention_masked"], distiller.student.backbone.c2)
    assert report.distillation.gradient_norm == pytest.approx(expected.item(), rel=1e-9)


def test_without_a_known_loss_of_the_detector_there_is_no_ratio():
    report = make(Net(4)).report(images())
    assert report.detector is None
    assert all(term.gradient_ratio is None for term in report.terms)
    assert min(term.gradient_norm for term in report.terms) > 0
    assert str(report).split("\n\n")[1].splitlines()[1].endswith("  -")
    assert report.notes == (NO_DETECTOR_LOSS,)


def test_a_student_in_eval_mode_that_returns_no_loss_is_told_both():
    distiller = make(Net(4))
    distiller.student.eval()
    said = "The student is in `eval` mode where it is to be trained: `distiller.train()`."
    assert distiller.report(images()).notes == (NO_DETECTOR_LOSS, said)


def test_a_student_of_two_losses_has_a_ratio_by_the_call_that_names_them():
    class Pair(Student):
        def forward(self, batch):
            return tuple(super().forward(batch).values())

    def named(student, batch):
        return dict(zip(("classes", "boxes"), student(batch), strict=True))

    assert make(Pair()).report(images()).notes[0] == NO_DETECTOR_LOSS
    report = make(Pair(), student_forward=named).report(images())
    assert report.detector.value > 0
    assert report.distillation.gradient_ratio > 0


def test_a_detector_that_does_not_train_what_the_distillation_reaches():
    class Apart(Student):
        def forward(self, batch):
            self.backbone(batch)
            return {"loss": self.head.weight.square().sum()}

    report = make(Apart()).report(images())
    assert report.detector.gradient_norm == 0
    assert report.distillation.gradient_ratio is None
    said = "The detector's loss has no gradient where the distillation's is: none to compare."
    assert report.notes[0] == said


def test_a_report_is_frozen():
    with pytest.raises(FrozenInstanceError):
        make().report(images()).detector = None


def test_printed_it_is_a_table():
    lines = str(make().report(images())).splitlines()
    assert lines[0].split() == [
        "level",
        "model",
        "path",
        "shape",
        "stride",
        "rms",
        "channels",
        "adapters",
    ]
    assert lines[1].startswith("c1     student  backbone.c1  2 x 4 x 8 x 12  2       0.")
    assert lines[1].endswith("4 -> 6    109")
    *teacher, size = lines[2].split()
    assert teacher == ["teacher", "backbone.c1", *["2", "x", "6", "x", "8", "x", "12"], "2"]
    assert float(size) > 0
    assert [line.split("  ")[0] for line in lines[6:12]] == [
        "term",
        "detector",
        "loss_attention_transfer",
        "loss_attention_masked",
        "loss_non_local",
        "distillation",
    ]
    header = ["term", "value", "gradient", "gradient / detector's"]
    assert re.split(r"\s{2,}", lines[6]) == header
    assert lines[7].split()[-1] == "1"
    assert lines[13].startswith("The distillation's gradient is ")
    assert len(lines) == 14


def test_one_term_needs_no_sum():
    distiller = Distiller(Summed(4), Net(6), Ratio(1.0), {"c1": "backbone.c1"})
    assert "\ndistillation" not in str(distiller.report(images()))


def test_a_detector_whose_images_are_a_list():
    student, teacher = detector("mobilenet").train(), detector("mobilenet")
    layers = {"c3": "backbone.body.6"}
    loss = FeatureDistillationLoss(40, 40, hyperparameters=MASKED)
    for shared_input, stride in (("backbone", 8.0), (None, None)):
        options = {"shared_input": shared_input}
        if shared_input is None:
            options = {"teacher_forward": lambda model, batch, _: model(batch)}
        distiller = Distiller(student, teacher, loss, layers, **options)
        report = distiller.report(detector_images(), detector_targets())
        assert report.levels[0].student_stride == report.levels[0].teacher_stride == stride
        assert report.levels[0].adapter_parameters > 0
        assert report.detector.gradient_ratio == 1
        assert "c3" in str(report)


def test_each_side_is_reported_with_its_own_path_and_tokens_without_a_stride():
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 4, 4), nn.Flatten(2)) for c in (4, 6))
    pair = {"c1": ("1", "0.1")}
    loss = Term(lambda x: {"term": x.mean()})
    distiller = Distiller(student.double(), nn.Sequential(teacher).double(), loss, pair)
    (level,) = distiller.report(images()).levels
    assert (level.student_path, level.teacher_path) == ("1", "0.1")
    assert level.student_shape == (2, 4, 24)
    assert (level.student_stride, level.teacher_stride) == (None, None)


class OfAList(Net):
    def forward(self, batch):
        return super().forward(torch.stack(batch))


def test_the_strides_are_those_of_the_tensor_that_is_shared():
    distiller = Distiller(OfAList(4), Net(6), distillation_loss(), LEVELS, shared_input="backbone")
    levels = distiller.report(list(images())).levels
    assert [(level.student_stride, level.teacher_stride) for level in levels] == [(2, 2), (4, 4)]


class Unbatched(Net):
    def forward(self, image):
        return super().forward(image[None])


def test_without_an_image_there_is_no_stride():
    distiller = Distiller(Unbatched(4), Unbatched(6), distillation_loss(), LEVELS)
    report = distiller.report(images()[0])
    assert {(level.student_stride, level.teacher_stride) for level in report.levels} == {
        (None,) * 2
    }
    rows = [re.split(r"\s{2,}", row) for row in str(report).split("\n\n")[0].splitlines()[1:]]
    assert [row[4] for row in rows] == ["-"] * 4


def test_a_report_without_values_is_an_error():
    models = [model.to("meta") for model in (Net(4), Net(6), distillation_loss())]
    call = lambda: Distiller(*models, LEVELS).report(images().to("meta"))  # noqa: E731
    raises(ValueError, call, "`distiller` must hold values to report, got the meta device.")


class Adapted(nn.Module):
    """A loss of the user's own, with adapters whose names may tell the level."""

    def __init__(self, **adapters):
        super().__init__()
        self.adapters = nn.ModuleDict(adapters).double()
        self.register_parameter("unused", nn.Parameter(torch.ones(5), requires_grad=False))

    def forward(self, student, teacher):
        adapted = [
            adapter(student[level]).mean()
            for level, adapter in zip(student, self.adapters.values(), strict=False)
        ]
        return {"mean": sum(adapted, start=student["c1"].mean()), "detector": student["c1"].mean()}


@pytest.mark.parametrize(
    ("adapters", "levels", "counts", "rest"),
    [
        ({"c1": nn.Conv2d(4, 6, 1), "c2": nn.Conv2d(8, 6, 1)}, ("c1", "c2"), [30, 54], ""),
        ({"c1": nn.Conv2d(4, 6, 1)}, ("c1", "c2"), [30, 0], ""),
        ({"first": nn.Conv2d(4, 6, 1)}, ("c1", "c2"), [None, None], "30 parameters"),
        ({"c1": nn.Conv2d(4, 6, 1), "x": nn.Linear(6, 2)}, ("c1", "c2"), [30, None], "14 param"),
        ({"first": nn.Conv2d(4, 6, 1)}, ("c1",), [30], ""),
        ({}, ("c1", "c2"), [0, 0], ""),
    ],
)
def test_the_adapters_of_a_loss_that_is_not_featkds(adapters, levels, counts, rest):
    layers = {level: LEVELS[level] for level in levels}
    loss = Adapted(**copy.deepcopy(adapters))
    report = Distiller(Student(), Net(6), loss, layers).report(images())
    assert [level.adapter_parameters for level in report.levels] == counts
    assert [term.name for term in report.terms] == ["mean", "detector"]
    assert report.detector.value > 0
    assert "\ndistillation " in str(report)
    rows = str(report).splitlines()[1 : 2 * len(levels) : 2]
    printed = ["-" if count is None else str(count) for count in counts]
    assert [row.split()[-1] for row in rows] == printed
    told = [note for note in report.notes if "names tell no level" in note]
    assert [note.startswith(f"The loss trains {rest}") for note in told] == [True] * bool(rest)


LOSS = torch.ones((), requires_grad=True)
OUTPUTS = {
    "mapping": ({"a": 2 * LOSS, "b": LOSS}, 3.0),
    "lists of them": ({"a": [2 * LOSS, LOSS], "b": LOSS[None]}, 4.0),
    "with an accuracy": ({"a": 2 * LOSS, "accuracy": torch.tensor(90.0)}, 2.0),
    "an attribute": (SimpleNamespace(loss=2 * LOSS, logits=torch.ones(3)), 2.0),
    "a scalar": (2 * LOSS, 2.0),
    "a loss and items": ((2 * LOSS, {"box": torch.ones(())}), 2.0),
    "parts and items": ((LOSS * torch.tensor([1.0, 2.0]), {"box": torch.ones(())}), 3.0),
    "parts and their values": ((LOSS * torch.ones(3), torch.ones(3)), 3.0),
    "a loss and logits": ((2 * LOSS, LOSS * torch.ones(2, 3)), 2.0),
    "a loss and two logits": ((2 * LOSS, LOSS * torch.ones(2)), 2.0),
    "two losses in a tuple": ((2 * LOSS, LOSS), None),
    "parts alone": ((LOSS * torch.ones(3),), None),
    "two outputs": ((LOSS * torch.ones(3), LOSS * torch.ones(3)), None),
    "maps": ((LOSS * torch.ones(2, 3), {"box": torch.ones(())}), None),
    "an empty tuple": ((), None),
    "no loss": (SimpleNamespace(loss=None, logits=torch.ones(3)), None),
    "logits": (torch.ones(2, 3, requires_grad=True), None),
    "a mapping with its loss": ({"loss": LOSS, "logits": torch.ones(3)}, 1.0),
    "a mapping of the whole and its parts": ({"loss": 3 * LOSS, "a": LOSS, "b": 2 * LOSS}, 3.0),
    "a mapping of more": ({"cost": LOSS, "logits": torch.ones(3)}, None),
    "an empty mapping": ({}, None),
    "detections": ([{"boxes": torch.ones(3, 4)}], None),
    "a constant": (torch.ones(()), None),
    "a number": ({"a": 1.0}, None),
}


@pytest.mark.parametrize(("output", "expected"), OUTPUTS.values(), ids=OUTPUTS)
def test_the_detectors_loss(output, expected):
    found = detector_loss(output)
    assert (None if found is None else found.item()) == expected


# --- no trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_report_leaves_everything_as_it_was(training, gradients):
    distiller = make().train(training)
    distiller.student.backbone.c1.eval()
    distiller.teacher.train()
    models = distiller.student, distiller.teacher, distiller.loss
    sum(sum(part.values()) for part in distiller(images())).backward()
    distiller.teacher.train()
    before = [snapshot(model) for model in models]
    buffers = [id(buffer) for model in models for buffer in model.buffers()]
    modes = [module.training for model in models for module in model.modules()]
    gradients_before = {
        name: value.grad.clone()
        for name, value in distiller.named_parameters()
        if value.grad is not None
    }
    numbers = torch.get_rng_state(), random.getstate()
    with torch.set_grad_enabled(gradients):
        report = distiller.report(images())
        assert torch.is_grad_enabled() == gradients
    assert report.detector.gradient_norm > 0
    assert all(map(unchanged, models, before))
    assert buffers == [id(buffer) for model in models for buffer in model.buffers()]
    assert modes == [module.training for model in models for module in model.modules()]
    for name, value in distiller.named_parameters():
        if value.grad is not None:
            close(value.grad, gradients_before.pop(name), 0.0)
    assert not gradients_before
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert all(value.grad is None for value in distiller.teacher.parameters())


def test_a_report_that_fails_leaves_everything_as_it_was_too():
    distiller = make()
    before = snapshot(distiller.student)
    distiller.teacher.head.train()
    fails = distiller.teacher.backbone.c2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distiller.report(images())
    fails.remove()
    assert unchanged(distiller.student, before)
    assert distiller.teacher.head.training


class Observer(nn.Module):
    """As those of quantisation, whose buffers are empty until the first forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("least", torch.empty(0))
        self.register_buffer("expanded", torch.full((1,), math.nan).expand(3))
        with torch.inference_mode():
            self.register_buffer("lazily", torch.zeros(2))

    def forward(self, x):
        self.least.resize_(x.shape[1]).copy_(x.detach().amin((0, 2, 3)))
        with torch.inference_mode():
            self.lazily += 1
        return x


def test_buffers_that_a_forward_resizes_or_nobody_can_write_are_left_as_they_were():
    student = Net(4)
    student.backbone.c1.norm = nn.Sequential(Observer(), nn.BatchNorm2d(4).double())
    distiller = make(student)
    buffers = dict(student.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    distiller.report(images())
    for name, value in student.named_buffers():
        assert value is buffers[name]
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_numpys_random_numbers_are_as_before():
    numpy.random.seed(0)
    expected = numpy.random.rand()
    numpy.random.seed(0)
    distiller = make()
    distiller.student.backbone.register_forward_hook(lambda *_: numpy.random.rand() and None)
    distiller.report(images())
    assert numpy.random.rand() == expected


def test_random_numbers_are_kept_for_the_devices_in_use_alone(monkeypatch):
    kept = []

    def keep(devices):
        kept.append(devices)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", keep)
    with FakeTensorMode():
        on_a_gpu = nn.Linear(1, 1, bias=False, device="meta")
        on_a_gpu.weight = nn.Parameter(torch.empty(1, 1, device="cuda"))
    for models in ([Net()], [Net(), on_a_gpu]):
        with preserved(*models):
            pass
    assert kept == [[], [torch.device("cuda", 0)]]


def test_a_report_changes_no_later_step():
    reported, plain = make(), None
    plain = copy.deepcopy(reported)
    reported.report(images())
    for distiller in (reported, plain):
        torch.manual_seed(1)
        random.seed(1)
        distiller.outcome = distiller(images())
    for ours, expected in zip(reported.outcome, plain.outcome, strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("look", ["report", "match_layers"])
def test_a_step_that_awaits_its_backward_is_not_spoilt(look):
    distiller, plain = make(), None
    plain = copy.deepcopy(distiller)
    for each in (distiller, plain):
        output, losses = each(images())
        if each is distiller and look == "report":
            each.report(images())
        elif each is distiller:
            match_layers(each.student, each.teacher, images())
        sum((output | losses).values()).backward()
    for ours, expected in zip(distiller.parameters(), plain.parameters(), strict=True):
        if expected.requires_grad:
            close(ours.grad, expected.grad, 0.0)


def test_a_report_of_a_model_whose_layers_are_made_by_its_first_forward():
    student = nn.Sequential(nn.LazyConv2d(4, 3, 2, 1), nn.LazyBatchNorm2d())
    loss = FeatureDistillationLoss({"c1": 4}, {"c1": 6})
    distiller = Distiller(student, nn.Conv2d(3, 6, 3, 2, 1), loss, {"c1": ("1", "")})
    report = distiller.report(torch.randn(2, 3, 8, 8))
    assert report.levels[0].student_shape == (2, 4, 4, 4)
    assert distiller.report(torch.randn(2, 3, 8, 8)).distillation.gradient_norm > 0


@pytest.mark.parametrize("part", ["student", "teacher", "distiller", "loss"])
def test_a_report_of_compiled_parts(part, fresh_compiler):
    plain = make(Net(4))
    student, teacher, loss = copy.deepcopy((plain.student, plain.teacher, plain.loss))
    counter = CompileCounterWithBackend("aot_eager")
    if part == "student":
        student = torch.compile(student, backend=counter)
    elif part == "teacher":
        teacher = torch.compile(teacher, backend=counter)
    elif part == "loss":
        loss.compile(backend=counter)
    distiller = Distiller(student, teacher, loss, LEVELS)
    if part == "distiller":
        distiller = torch.compile(distiller, backend=counter)
    expected = plain.report(images())
    for ours, term in zip(distiller.report(images()).terms, expected.terms, strict=True):
        assert ours.value == pytest.approx(term.value)
        assert ours.gradient_norm == pytest.approx(term.gradient_norm)
