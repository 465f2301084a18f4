"""Distiller.report and what is logged at first use: figures, warnings, and no trace left."""

import copy
import logging
import math
import random
import warnings
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from cases import close
from models import (
    LEVELS,
    NORMALIZED,
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
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from featkd import Distiller, FeatureDistillationLoss, Hyperparameters
from featkd.report import detector_loss

MASKED = Hyperparameters(0.0, 1.0, 0.0, 0.5, normalize=True)


class Student(Net):
    """A `Net` with losses of its own, that draws random numbers and counts its steps."""

    def __init__(self, width=4, scale=1.0):
        super().__init__(width, inplace=False)
        self.scale = scale
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        self.steps = self.steps + 1
        noise = torch.rand(1).to(batch) + random.random()
        output = super().forward(batch).square().mean()
        return {"classes": self.scale * output, "boxes": 0.5 * self.scale * output + 0 * noise}


def make(student=None, hyperparameters=NORMALIZED, **options):
    loss = distillation_loss(hyperparameters=hyperparameters)
    return Distiller(student or Student(), Net(6), loss, LEVELS, **options)


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


def test_each_term_has_its_share_of_the_loss_and_of_the_gradient():
    distiller = make()
    report = distiller.report(images())
    named, norms = {}, {}
    for name in ("detector", "attention_transfer", "attention_masked", "non_local"):
        own, losses = distiller(images())
        named[name] = losses.get(name, sum(own.values()))
        norms[name] = gradient_norm(named[name], distiller.student)
    terms = [report.detector, *report.terms]
    assert [term.name for term in terms] == list(named)
    for term in terms:
        assert term.value == pytest.approx(named[term.name].item(), rel=1e-9)
        share = named[term.name] / sum(named.values())
        assert term.loss_share == pytest.approx(share.item(), rel=1e-9)
        share = norms[term.name] / sum(norms.values())
        assert term.gradient_share == pytest.approx(share.item(), rel=1e-9)
    assert min(term.gradient_share for term in terms) > 0


def test_without_a_known_loss_of_the_detector_the_terms_are_compared_with_each_other():
    report = make(Net(4)).report(images())
    assert report.detector is None
    assert all(term.loss_share is None for term in report.terms)
    assert sum(term.gradient_share for term in report.terms) == pytest.approx(1.0)
    assert str(report).endswith("in training mode alone: `distiller.train()`).")


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
        "channels",
        "adapters",
    ]
    assert lines[1].startswith("c1     student  backbone.c1  2 x 4 x 8 x 12  2       4 -> 6    109")
    assert lines[2].split() == [
        "teacher",
        "backbone.c1",
        *["2", "x", "6", "x", "8", "x", "12"],
        "2",
    ]
    assert [line.split("  ")[0] for line in lines[6:]] == [
        "term",
        "detector",
        "attention_transfer",
        "attention_masked",
        "non_local",
    ]
    assert all("%" in line for line in lines[7:])


@pytest.mark.filterwarnings("ignore:attention_masked is:UserWarning")  # random weights
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
        assert report.detector.loss_share > 0
        assert "c3" in str(report)


def test_a_loss_that_is_not_featkds():
    class Mean(nn.Module):
        def forward(self, student, teacher):
            return {"mean": student["c1"].mean(), "detector": student["c1"].square().mean()}

    report = Distiller(Student(), Net(6), Mean(), {"c1": "backbone.c1"}).report(images())
    assert [level.adapter_parameters for level in report.levels] == [None]
    assert [term.name for term in report.terms] == ["mean", "detector"]
    assert report.detector.value > 0


LOSS = torch.ones((), requires_grad=True)
OUTPUTS = {
    "mapping": ({"a": 2 * LOSS, "b": LOSS}, 3.0),
    "lists of them": ({"a": [2 * LOSS, LOSS], "b": LOSS[None]}, 4.0),
    "with an accuracy": ({"a": 2 * LOSS, "accuracy": torch.tensor(90.0)}, 2.0),
    "an attribute": (SimpleNamespace(loss=2 * LOSS, logits=torch.ones(3)), 2.0),
    "a scalar": (2 * LOSS, 2.0),
    "no loss": (SimpleNamespace(loss=None, logits=torch.ones(3)), None),
    "logits": (torch.ones(2, 3, requires_grad=True), None),
    "a mapping of more": ({"loss": LOSS, "logits": torch.ones(3)}, None),
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
    assert report.detector.gradient_share > 0
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


@pytest.mark.parametrize("part", ["student", "teacher", "distiller"])
def test_a_report_of_compiled_parts(part, fresh_compiler):
    plain = make(Net(4))
    student, teacher, loss = copy.deepcopy((plain.student, plain.teacher, plain.loss))
    counter = CompileCounterWithBackend("aot_eager")
    if part == "student":
        student = torch.compile(student, backend=counter)
    elif part == "teacher":
        teacher = torch.compile(teacher, backend=counter)
    distiller = Distiller(student, teacher, loss, LEVELS)
    if part == "distiller":
        distiller = torch.compile(distiller, backend=counter)
    expected = plain.report(images())
    for ours, term in zip(distiller.report(images()).terms, expected.terms, strict=True):
        assert ours.value == pytest.approx(term.value)
        assert ours.gradient_share == pytest.approx(term.gradient_share)


# --- warnings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_parameters_that_no_optimizer_holds_are_warned_of(kind):
    distiller = make()
    make_optimizer = getattr(torch.optim, kind)
    with pytest.warns(UserWarning, match=r"[\d,]+ parameters in \d+ tensors .*'loss\."):
        distiller.report(images(), optimizer=make_optimizer(distiller.student.parameters(), 0.1))
    with pytest.warns(UserWarning, match=r"[\d,]+ parameters in \d+ tensors .*'student\."):
        distiller.report(images(), optimizer=make_optimizer(distiller.loss.parameters(), 0.1))
    distiller.report(images(), optimizer=make_optimizer(distiller.parameters(), 0.1))


def test_the_warning_counts_what_is_left_out():
    distiller = make()
    held, *left_out = [value for value in distiller.loss.parameters() if value.requires_grad]
    count = sum(value.numel() for value in left_out)
    groups = [{"params": distiller.student.parameters()}, {"params": [held]}]
    with pytest.warns(UserWarning, match=f"^{count:,} parameters in {len(left_out)} tensors"):
        distiller.report(images(), optimizer=torch.optim.SGD(groups, 0.1))


SCALES = [(1e-4, "larger", "lower"), (1e4, "smaller", "raise")]


@pytest.mark.parametrize(("scale", "side", "advice"), SCALES)
def test_a_term_out_of_scale_is_warned_of_with_the_number_and_the_advice(scale, side, advice):
    distiller = make(Student(scale=scale), MASKED)
    with pytest.warns(UserWarning, match="the detector's loss") as caught:
        report = distiller.report(images())
    (warning,) = caught
    ratio = report.terms[1].value / report.detector.value
    factor = max(ratio, 1 / ratio)
    assert factor > 100
    assert f"attention_masked is {report.terms[1].value:.3g}" in str(warning.message)
    assert f"{factor:.3g} times {side}" in str(warning.message)
    assert f"{advice} its weight" in str(warning.message)
    assert warning.filename == __file__


def with_value(x, value):
    """This value, with the gradient of `x`."""
    return x - x.detach() + value


@pytest.mark.parametrize(("ratio", "said"), [(100.0, 1), (99.0, 0), (0.01, 1), (0.0101, 0)])
def test_the_line_is_at_a_hundred(ratio, said):
    class Constant(nn.Module):
        def forward(self, student, teacher):
            return {"term": with_value(student["c1"].sum(), 8.0 * ratio)}

    class Eight(Net):
        def forward(self, batch):
            return 0 * super().forward(batch).sum() + 8.0

    distiller = Distiller(Eight(4), Net(6), Constant(), {"c1": "backbone.c1"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller.report(images())
    assert len(caught) == said


class Term(nn.Module):
    """A loss that is this function of the student's features."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, student, teacher):
        return self.function(student["c1"])


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: {"term": x.sum() * math.nan}, "term is nan: a step with it spoils"),
        (lambda x: {"term": x.sum() * math.inf}, "term is inf: a step with it spoils"),
        (lambda x: {"term": x.detach().square().mean()}, "term has no gradient to the student's"),
        (lambda x: {"term": 0 * x.sum()}, "the distillation loss is 0: nothing is distilled."),
        (lambda x: {}, "the distillation loss is 0: nothing is distilled."),
    ],
    ids=["NaN", "inf", "detached", "zero", "no term"],
)
def test_a_loss_that_trains_nothing_is_warned_of_and_the_report_says_so(function, text):
    distiller = Distiller(Student(), Net(6), Term(function), {"c1": "backbone.c1"})
    with pytest.warns(UserWarning, match=f"^{text}") as caught:
        report = distiller.report(images())
    assert report.warnings == tuple(str(warning.message) for warning in caught)
    assert str(report).endswith("".join(f"\n\nWarning: {said}" for said in report.warnings))


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
    assert str(distiller.report(images())).split("\n\n")[0] in text
    assert len(caplog.records) == 1


def test_of_several_processes_the_first_alone_logs(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "featkd")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        make(Student(scale=1e-4), MASKED)(images())
        assert len(caplog.records) == (0 if rank else 2)


def test_nothing_is_said_of_a_step_in_scale(capfd):
    make()(images())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("scale", "side"), [(1e-4, "larger"), (1e4, "smaller")])
def test_the_first_training_step_says_what_is_out_of_scale_once(scale, side, caplog):
    distiller = make(Student(scale=scale), MASKED)
    for _ in range(3):
        distiller(images())
    (text,) = messages(caplog, logging.WARNING)
    assert "attention_masked" in text
    assert f"times {side}" in text


def test_a_silenced_logger_costs_no_reading_of_values(monkeypatch):
    distiller = make()
    monkeypatch.setattr(logging.getLogger("featkd"), "disabled", True)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("read"))
    distiller(images())


def test_values_are_read_at_the_first_step_alone(monkeypatch):
    distiller = make()
    distiller(images())
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("read"))
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
