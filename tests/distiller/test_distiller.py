"""Distiller: the student's output untouched, and the losses beside it."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from featkd import Distiller, FeatureDistillationLoss
from tests.helpers.distilled import (
    HF_STAGES,
    TERM,
    HasTrunk,
    Inputs,
    RunsTwice,
    Seen,
    build,
    from_stage,
    make,
    pixels,
)
from tests.helpers.models import (
    LEVELS,
    Net,
    by_torch_save,
    detector,
    detector_images,
    detector_targets,
    detr,
    distillation_loss,
    hook_count,
    images,
    plain_hooks,
    raises,
    rt_detr,
    snapshot,
    timm_backbone,
    unchanged,
    watch,
)
from tests.helpers.tapped import Checkpointed
from tests.helpers.tensors import close

# --- what it returns ------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_the_output_is_the_students_and_the_losses_are_of_plain_hooks(shared_input):
    distiller = make(shared_input=shared_input)
    student, teacher = copy.deepcopy((distiller.student, distiller.teacher))
    features = [
        plain_hooks(model, LEVELS.values(), partial(model, images()))
        for model in (student, teacher.eval())
    ]
    output, losses = distiller(images())
    close(output, copy.deepcopy(student).train()(images()), 0.0)
    ours, theirs = ({level: f[path] for level, path in LEVELS.items()} for f in features)
    expected = distiller.loss(ours, theirs)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        close(value, expected[name])


def test_the_gradient_reaches_the_students_backbone_and_the_adapters_alone():
    distiller = make()
    sum(distiller(images())[1].values()).backward()
    for name, parameter in distiller.named_parameters():
        if name.startswith("student.head") or not parameter.requires_grad:
            assert parameter.grad is None, name
        elif not name.endswith("conv.bias"):  # a batch norm takes these away
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_another_path_for_each_model():
    student, teacher = Net(4), HasTrunk(6)
    layers = {level: (path, path.replace("backbone", "trunk")) for level, path in LEVELS.items()}
    distiller = Distiller(student, teacher, distillation_loss(), layers)
    assert distiller(images())[1]["loss_non_local"] > 0


def test_any_module_of_two_mappings_is_a_loss():
    distiller = Distiller(Net(4), Net(6), Seen(), LEVELS)
    _, losses = distiller(images())
    assert losses.keys() == {"seen"}
    assert distiller.loss.teacher.keys() == distiller.loss.student.keys() == LEVELS.keys()


def test_evaluation_without_gradients():
    distiller = make().eval()
    with torch.no_grad():
        output, losses = distiller(images())
    close(output, distiller.student(images()), 0.0)
    assert not any(value.requires_grad for value in losses.values())


@pytest.mark.parametrize("call", [None, lambda model, batch, scale: model(batch, scale=scale)])
def test_evaluation_takes_all_arguments_of_the_students_call(call):
    layers = {"c1": ("trunk.c1", "trunk.c1")}
    distiller = build(HasTrunk(4), HasTrunk(6), layers=layers, student_forward=call).eval()
    output, losses = distiller(images(), scale=3)
    close(output, distiller.student(3 * images()), 0.0)
    assert losses == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype(dtype):
    distiller = Distiller(
        Net(4).float(),
        Net(6).to(dtype),
        distillation_loss().float(),
        LEVELS,
        shared_input="backbone",
    )
    _, losses = distiller(images().float())
    assert all(value.isfinite() for value in losses.values())


def test_autocast():
    distiller = make().float()
    distiller.teacher.float()
    expected = distiller(images().float())[1]
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = distiller(images().float())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        close(value, expected[name], 0.05)


def test_a_frozen_student_is_an_error():
    distiller = make()
    distiller.student.backbone.requires_grad_(False)
    raises(RuntimeError, lambda: distiller(images()), "'backbone.c1'")


# --- other layouts --------------------------------------------------------------------------------


class AsTokens(nn.Module):
    def forward(self, maps):
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens], dim=1)


class AsMaps(nn.Module):
    def forward(self, tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (8, 12))


class Tokens(Net):
    """A `Net` whose first stage puts out a token that is no position's, then those that are."""

    def __init__(self, width):
        super().__init__(width)
        first, second = self.backbone
        self.backbone.c1 = nn.Sequential(first, AsTokens())
        self.backbone.c2 = nn.Sequential(AsMaps(), second)


CONVERTS = {
    "both": (Tokens, Tokens, from_stage),
    "the student's": (Tokens, Net, (from_stage, None)),
    "the teacher's": (Net, Tokens, (None, from_stage)),
    "neither": (Net, Net, (None, None)),
}


@pytest.mark.parametrize("shared_input", [None, "backbone"])
@pytest.mark.parametrize(("student", "teacher", "convert"), CONVERTS.values(), ids=CONVERTS)
def test_tokens_are_converted_for_the_loss(student, teacher, convert, shared_input):
    plain = make(shared_input=shared_input)
    student, teacher = student(4), teacher(6)
    for model, other in ((student, plain.student), (teacher, plain.teacher)):
        values = other.state_dict().values()
        model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    distiller = Distiller(
        student,
        teacher,
        copy.deepcopy(plain.loss),
        LEVELS,
        shared_input=shared_input,
        convert={"c1": convert},
    )
    gradients = []
    for each in (distiller, copy.deepcopy(distiller), plain):
        output, losses = each(images())
        total = output.square().mean() + sum(losses.values())
        trained = [value for value in each.parameters() if value.requires_grad]
        gradients.append([total, *torch.autograd.grad(total, trained)])
    for values in gradients[:2]:
        for ours, expected in zip(values, gradients[2], strict=True):
            close(ours, expected)


def test_no_conversion_is_an_empty_mapping_too():
    assert make(convert={})(images())[1].keys() == make()(images())[1].keys()


# --- modules that run several times ---------------------------------------------------------------


def test_the_towers_of_retinanet_are_levels_each():
    student, teacher = detector("retinanet").train(), detector("retinanet")
    path = "head.classification_head.conv"
    build_it = partial(Distiller, student, teacher, Seen(), {"tower": path})
    with pytest.raises(RuntimeError, match=re.escape("calls={'tower': 5}")):
        build_it()(detector_images(), detector_targets())
    levels = [f"tower[{index}]" for index in range(5)]
    channels = dict.fromkeys(levels, 256)
    loss = FeatureDistillationLoss(channels, channels, hyperparameters=TERM)
    distiller = Distiller(student, teacher, loss, {"tower": path}, calls={"tower": 5})
    batch = detector_images(), detector_targets()
    runs = [list_outputs(model.get_submodule(path)) for model in (student, teacher)]
    _, losses = distiller(*batch)
    expected = loss(*(dict(zip(levels, run, strict=True)) for run in runs))
    close(losses["loss_attention_masked"], expected["loss_attention_masked"])
    report = distiller.report(*batch)
    assert [level.name for level in report.levels] == levels
    assert {level.teacher_path for level in report.levels} == {path}
    assert copy.deepcopy(distiller)(*batch)[1].keys() == losses.keys()


def list_outputs(module):
    """What a module puts out, call by call."""
    found = []
    module.register_forward_hook(lambda module, args, output: found.append(output.clone()))
    return found


def test_the_conversion_of_a_level_is_that_of_each_call():
    halves = {"c1": (lambda maps: maps / 2, None)}
    distiller = Distiller(
        RunsTwice(4), RunsTwice(6), Seen(), {"c1": "backbone.c1"}, calls={"c1": 2}, convert=halves
    )
    runs = list_outputs(distiller.student.backbone.c1)
    distiller(images())
    assert distiller.loss.student.keys() == distiller.loss.teacher.keys() == {"c1[0]", "c1[1]"}
    for index in range(2):
        assert torch.equal(distiller.loss.student[f"c1[{index}]"], runs[index] / 2)


# --- names of losses ------------------------------------------------------------------------------


class Detects(Net):
    def forward(self, batch):
        return {"loss_box": super().forward(batch).square().mean()}


class Names(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, student, teacher):
        return {self.name: student["c1"].mean()}


def test_a_loss_of_the_detectors_own_name_is_an_error():
    distiller = Distiller(Detects(4), Net(6), Names("loss_box"), LEVELS)
    raises(ValueError, lambda: distiller(images()), "'loss_box'")
    raises(ValueError, lambda: distiller.report(images()), "'loss_box'")
    output, losses = Distiller(Detects(4), Net(6), Names("loss_kd"), LEVELS)(images())
    assert (output | losses).keys() == {"loss_box", "loss_kd"}


# --- copies ---------------------------------------------------------------------------------------


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda distiller: pickle.loads(pickle.dumps(distiller)),
    "torch.save": by_torch_save,
    "AveragedModel": lambda distiller: AveragedModel(distiller).module,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_a_copy_works_on_its_own(make_copy, shared_input):
    distiller = make(shared_input=shared_input)
    distiller(images())
    duplicate = make_copy(distiller)
    assert duplicate.student is not distiller.student
    assert duplicate.teacher is not distiller.teacher
    seen = Inputs(distiller.student), Inputs(distiller.teacher)
    output, losses = duplicate(images())
    assert not any(seen)
    expected_output, expected = distiller(images())
    close(output, expected_output, 0.0)
    for name, value in losses.items():
        close(value, expected[name], 0.0)
    output.sum().backward()
    assert distiller.student.head.weight.grad is None


def test_the_hooks_go_with_the_distiller():
    distiller = make(shared_input="backbone")
    student, teacher = distiller.student, distiller.teacher
    assert hook_count(student) > 0 < hook_count(teacher)
    del distiller
    assert hook_count(student) == hook_count(teacher) == 0


def test_a_replica_of_data_parallel_is_an_error():
    distiller = make()
    replica = distiller._replicate_for_data_parallel()
    replica.student = distiller.student._replicate_for_data_parallel()
    raises(RuntimeError, lambda: replica(images()), "DataParallel")


# --- what a training script does to the student ---------------------------------------------------


def test_a_checkpointed_student_has_the_gradients_of_a_plain_one():
    plain = make(shared_input="backbone")
    student = Checkpointed(use_reentrant=False)
    student.load_state_dict(plain.student.state_dict())
    loss, teacher = copy.deepcopy((plain.loss, plain.teacher))
    distiller = Distiller(student, teacher, loss, LEVELS, shared_input="backbone")
    for _ in range(2):
        for each in (plain, distiller):
            output, losses = each(images())
            (output.square().mean() + sum(losses.values())).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, expected[name].grad)


def test_a_student_with_reentrant_checkpointing_is_an_error():
    student = Checkpointed(use_reentrant=True)
    distiller = Distiller(student, Net(6), distillation_loss(), LEVELS)
    raises(RuntimeError, lambda: distiller(images()), "use_reentrant=False")


@pytest.mark.one_graph
def test_the_student_exports_as_if_it_had_never_been_distilled():
    distiller = make(shared_input="backbone")
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    for _ in range(2):
        output, losses = distiller(images())
        (output.square().mean() + sum(losses.values())).backward()
        optimizer.step()
    student, untouched = distiller.student.eval(), Net().eval()
    untouched.load_state_dict(student.state_dict())
    programs = [torch.export.export(model, (images(),)) for model in (student, untouched)]
    assert str(programs[0]) == str(programs[1])
    close(programs[0].module()(images()), untouched(images()), 0.0)


# --- real models ----------------------------------------------------------------------------------


BODY = {"c3": "backbone.body.layer2", "c4": "backbone.body.layer3"}
BODY_OF_MOBILENET = {
    "c3": ("backbone.body.6", "backbone.body.layer2"),
    "c4": ("backbone.body.12", "backbone.body.layer3"),
}
FEATURES = {"c3": "backbone.features.0.6", "c4": "backbone.features.0.12"}
PYRAMID = {"p3": "backbone[0]", "p4": "backbone[1]"}
detections = detector_images(), detector_targets()
REAL = {
    "fasterrcnn": (*[partial(detector, "fasterrcnn")] * 2, BODY, "backbone", detections),
    "retinanet": (*[partial(detector, "retinanet")] * 2, BODY, "backbone", detections),
    "fcos": (*[partial(detector, "fcos")] * 2, BODY, "backbone", detections),
    "pyramid": (
        partial(detector, "fcos"),
        partial(detector, "retinanet"),
        PYRAMID,
        "backbone",
        detections,
    ),
    "mobilenet": (
        partial(detector, "mobilenet"),
        partial(detector, "retinanet"),
        BODY_OF_MOBILENET,
        "backbone",
        detections,
    ),
    "ssdlite": (*[partial(detector, "ssdlite")] * 2, FEATURES, "backbone", detections),
    "detr": (partial(detr, 8, 8, 16, 16), partial(detr, 8, 16, 16, 32), HF_STAGES, None, pixels),
    "rt_detr": (
        partial(rt_detr, 8, 8, 16, 16),
        partial(rt_detr, 8, 16, 16, 32),
        HF_STAGES,
        None,
        pixels,
    ),
    "timm": (
        partial(timm_backbone, "mobilenetv3_small_050"),
        partial(timm_backbone, "convnext_atto"),
        {"c3": ("blocks.1", "stages_1"), "c4": ("blocks.3", "stages_2")},
        None,
        pixels,
    ),
}


def marks(name):
    return [pytest.mark.model_zoo] if name in ("detr", "rt_detr", "timm") else []


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "shared_input", "inputs"),
    [pytest.param(*case, id=name, marks=marks(name)) for name, case in REAL.items()],
)
def test_real_models(student, teacher, layers, shared_input, inputs):
    # transformers freezes DETR's backbone
    student, teacher = student().train().requires_grad_(True), teacher().train()
    distiller = Distiller(student, teacher, Seen(), layers, shared_input=shared_input)
    optimizer = torch.optim.SGD(distiller.parameters(), 1e-4)
    before, names = snapshot(teacher), list(student.state_dict())
    pairs = {level: (p, p) if isinstance(p, str) else p for level, p in layers.items()}
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    with watch(student, ours) as student_features, watch(teacher, theirs) as teacher_features:
        _, losses = distiller(*inputs)
    for level, (our_path, their_path) in pairs.items():
        assert torch.equal(distiller.loss.student[level], student_features[our_path])
        assert torch.equal(distiller.loss.teacher[level], teacher_features[their_path])
    sum(losses.values()).backward()
    first = next(parameter for parameter in student.parameters() if parameter.dim() == 4)
    assert first.grad.abs().sum() > 0
    optimizer.step()
    assert unchanged(teacher, before)
    assert list(student.state_dict()) == names
    assert all(parameter.grad is None for parameter in teacher.parameters())
