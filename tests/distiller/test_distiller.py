"""Distiller: the student's output untouched, the same pixels, and a teacher that never moves."""

import copy
import io
import pickle
import re
import threading
from collections import OrderedDict, UserDict
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from featkd import (
    Distiller,
    FeatureDistillationLoss,
    FeatureTap,
    Hyperparameters,
    from_tokens,
)
from featkd.distiller.normalization import Normalization, Renormalize
from featkd.distiller.placement import home, placed
from featkd.taps.early_stop import stopped_after_last_capture
from tests.helpers.models import (
    LEVELS,
    Net,
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
from tests.helpers.tensors import close


def make(student=4, teacher=6, **options):
    return Distiller(
        Net(student), Net(teacher), distillation_loss(student, teacher), LEVELS, **options
    )


# One term alone, in figures that are near 1.
TERM = Hyperparameters(alpha=0.0, beta=1.0, gamma=0.0, temperature=1.0, normalize=True)


class Seen(nn.Module):
    """A loss that keeps what it was given; its gradient reaches every student feature."""

    def forward(self, student, teacher):
        self.student, self.teacher = student, teacher
        return {"seen": sum(feature.square().mean() for feature in student.values())}


class Inputs(list):
    """What enters a module, call by call."""

    def __init__(self, module):
        super().__init__()
        module.register_forward_pre_hook(lambda module, args: self.append(args[0].clone()))


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


class HasTrunk(nn.Module):
    """A `Net` whose backbone has another name."""

    def __init__(self, width):
        super().__init__()
        self.trunk = Net(width).backbone
        self.calls = 0

    def forward(self, images, scale=1):
        self.calls += 1
        return self.trunk(scale * images)


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


from_stage = partial(from_tokens, size=(8, 12), prefix=1)
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


# --- the teacher ----------------------------------------------------------------------------------


class Watched(Net):
    """Notes on every call whether it trains and whether gradients are recorded."""

    def __init__(self, width):
        super().__init__(width)
        self.backbone.c2.register_forward_hook(
            lambda module, args, output: self.seen.append(
                (any(m.training for m in self.modules()), output.requires_grad)
            )
        )
        self.seen = []


def train_teacher(distiller):
    distiller.teacher.train()


def train_distiller(distiller):
    distiller.train()


def train_a_part(distiller):
    distiller.teacher.backbone.c1.norm.train()


@pytest.mark.parametrize("shared_input", [None, "backbone"])
@pytest.mark.parametrize("disturb", [train_distiller, train_teacher, train_a_part])
def test_the_teacher_evaluates_and_stays_bit_equal_whatever_is_set_to_train(disturb, shared_input):
    teacher = Watched(6)
    distiller = Distiller(Net(4), teacher, distillation_loss(), LEVELS, shared_input=shared_input)
    optimizer = torch.optim.AdamW(distiller.parameters(), 0.1)
    before, student = snapshot(teacher), snapshot(distiller.student)
    for seed in range(3):
        disturb(distiller)
        output, losses = distiller(images(seed=seed))
        (output.square().mean() + sum(losses.values())).backward()
        optimizer.step()
    assert teacher.seen == [(False, False)] * 3
    assert unchanged(teacher, before)
    assert not unchanged(distiller.student, student)


def test_train_and_eval_of_the_distiller_reach_the_student():
    distiller = make()
    assert distiller.train().student.backbone.c1.training
    assert not distiller.eval().student.backbone.c1.training


def test_the_teacher_is_no_part_of_the_distiller():
    distiller = make()
    teacher = distiller.teacher
    children = {"student": distiller.student, "loss": distiller.loss}
    assert dict(distiller.named_children()) == children
    held = {id(value) for value in [*teacher.parameters(), *teacher.buffers()]}
    assert not held & {id(value) for value in [*distiller.parameters(), *distiller.buffers()]}
    assert not set(teacher.modules()) & set(distiller.modules())
    prefixes = {name.split(".")[0] for name in distiller.state_dict()}
    assert prefixes == {"student", "loss"}
    distiller.float()
    assert next(teacher.parameters()).dtype == torch.float64


def test_a_printed_distiller_says_what_it_is_made_of():
    said = f"teacher=Net, layers={LEVELS}, shared_input=('backbone', 'backbone')"
    assert said in repr(make(shared_input="backbone"))


def test_the_state_dict_goes_into_another_distiller():
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    close(second(images())[0], first(images())[0], 0.0)


# --- the same pixels ------------------------------------------------------------------------------


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


# --- the same normalisation -----------------------------------------------------------------------

FLOAT, COUNTS = images().float(), torch.tensor([3, 4])
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Normalized(Net):
    """Says how it normalises, as torchvision's detectors do, and sees pictures in RGB and 0..1."""

    def __init__(self, width, mean, std):
        super().__init__(width)
        self.transform = SimpleNamespace(image_mean=mean, image_std=std)

    def sees(self, picture):
        mean, std = (
            torch.tensor(values, dtype=picture.dtype)[:, None, None]
            for values in (self.transform.image_mean, self.transform.image_std)
        )
        return (picture - mean) / std


class Preprocessed(Net):
    """As mmdet's detectors do: pictures come in BGR and 0..255."""

    def __init__(self, width, mean=None, std=None, *, rgb=False):
        super().__init__(width)
        self.data_preprocessor = preprocessor = nn.Module()
        preprocessor._enable_normalize = mean is not None
        preprocessor._channel_conversion = rgb
        if mean is not None:
            for name, values in (("mean", mean), ("std", std)):
                preprocessor.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)

    def sees(self, picture):
        preprocessor, batch = self.data_preprocessor, 255 * picture.flip(1)
        if preprocessor._channel_conversion:
            batch = batch.flip(1)
        return (
            (batch - preprocessor.mean) / preprocessor.std
            if preprocessor._enable_normalize
            else batch
        )


MEANS = [123.675, 116.28, 103.53]
NORMALIZED = {
    "torchvision": lambda width: Normalized(width, *IMAGENET),
    "ssdlite": lambda width: Normalized(width, [0.5] * 3, [0.5] * 3),
    "ssd": lambda width: Normalized(width, (0.48235, 0.45882, 0.40784), (1 / 255,) * 3),
    "mmdet": lambda width: Preprocessed(width, MEANS, [58.395, 57.12, 57.375], rgb=True),
    "caffe": lambda width: Preprocessed(width, MEANS[::-1], [1.0] * 3),
    "yolox": lambda width: Preprocessed(width),
    "one number": lambda width: Preprocessed(width, [127.5], [127.5], rgb=True),
}


@pytest.mark.parametrize("ours", NORMALIZED)
@pytest.mark.parametrize("theirs", NORMALIZED)
def test_the_teacher_sees_the_picture_in_its_own_normalisation(ours, theirs):
    student, teacher = NORMALIZED[ours](4), NORMALIZED[theirs](6)
    distiller = Distiller(student, teacher, Seen(), LEVELS, shared_input="backbone")
    seen = Inputs(teacher.backbone)
    picture = images().sigmoid()
    distiller(student.sees(picture))
    # The two that agree up to rounding share the tensor too.
    if ours == theirs or {ours, theirs} == {"torchvision", "mmdet"}:
        assert torch.equal(seen[0], student.sees(picture))
    else:
        close(seen[0], teacher.sees(picture), 1e-6)


@pytest.mark.parametrize("ours", ["ssdlite", "ssd"])
def test_a_detector_that_normalises_otherwise_gives_the_teacher_its_own_pixels(ours):
    student, teacher = detector(ours).train(), detector("fasterrcnn")
    layers = {"c3": ("backbone.features.0", "backbone.body.layer2")}
    options = {
        "shared_input": "backbone",
        # Without its head, which takes seconds.
        "student_forward": lambda model, batch: model.backbone(model.transform(batch)[0].tensors),
    }
    distiller = Distiller(student, teacher, Seen(), layers, **options)
    seen = Inputs(teacher.backbone)
    batch = detector_images()
    # The student's pixels: resized, and not normalised.
    resized = copy.deepcopy(student.transform)
    resized.image_mean, resized.image_std = [0.0] * 3, [1.0] * 3
    pixels, _ = resized(batch)
    distiller(batch)
    close(seen[0], torch.stack([teacher.transform.normalize(x) for x in pixels.tensors]), 1e-5)


def test_the_conversion_is_computed_in_float32_for_a_teacher_of_16_bits():
    student, teacher = NORMALIZED["ssd"](4).float(), NORMALIZED["torchvision"](6).bfloat16()
    distiller = Distiller(student, teacher, Seen(), LEVELS, shared_input="backbone")
    seen = Inputs(teacher.backbone)
    picture = images().float().sigmoid()
    distiller(student.sees(picture))
    assert seen[0].dtype == torch.bfloat16
    close(seen[0].float(), teacher.sees(picture), 2**-8)


def test_the_conversion_is_computed_in_float32_for_images_of_16_bits():
    conversion = Renormalize(
        Normalization((0.48, 0.46, 0.41), (1 / 255,) * 3), Normalization((0.5,), (0.25,))
    )
    pictures = (100 * images()).half()
    assert torch.equal(conversion(pictures), conversion(pictures.float()))


@pytest.mark.parametrize("wrap", [nn.Sequential, AveragedModel])
def test_the_normalisation_is_found_in_a_wrapped_detector(wrap):
    student, teacher = NORMALIZED["ssd"](4), NORMALIZED["torchvision"](6)
    inner = "0" if wrap is nn.Sequential else "module"
    layers = {level: (path, f"{inner}.{path}") for level, path in LEVELS.items()}
    pair = ("backbone", f"{inner}.backbone")
    made = Distiller(student, wrap(teacher), Seen(), layers, shared_input=pair)
    distiller = copy.deepcopy(made)
    seen = Inputs(distiller.teacher.get_submodule(pair[1]))
    picture = images().sigmoid()
    distiller(student.sees(picture))
    close(seen[0], teacher.sees(picture))


AS_IT_IS = {
    "a deeper feature": ("ssd", "torchvision", "backbone.c2"),
    "the detector itself": ("ssd", "torchvision", ""),
    "a mean without a deviation": ("half", "torchvision", "backbone"),
    "a preprocessor without an order of channels": ("orderless", "torchvision", "backbone"),
    "a deeper feature, one number for all": ("one number", "yolox", "backbone.c2"),
    "a student that says nothing": (None, "torchvision", "backbone"),
    "a teacher that says nothing": ("ssd", None, "backbone"),
    "more numbers than channels": ("rgbd", "torchvision", "backbone"),
}


@pytest.mark.parametrize(("ours", "theirs", "path"), AS_IT_IS.values(), ids=AS_IT_IS)
def test_what_is_no_image_or_of_unknown_normalisation_is_shared_as_it_is(ours, theirs, path):
    orderless = NORMALIZED["mmdet"](4)
    del orderless.data_preprocessor._channel_conversion
    kinds = NORMALIZED | {
        None: Net,
        "rgbd": lambda width: Normalized(width, [0.5] * 4, [0.5] * 4),
        "half": lambda width: Normalized(width, [0.5] * 3, None),
        "orderless": lambda width: orderless,
    }
    student, teacher = kinds[ours](4), kinds[theirs](4)
    distiller = Distiller(student, teacher, Seen(), {"c2": "backbone.c2"}, shared_input=path)
    inputs = Inputs(student.get_submodule(path)), Inputs(teacher.get_submodule(path))
    distiller(images())
    assert torch.equal(*(seen[0] for seen in inputs))


def test_numbers_that_differ_in_rounding_alone_convert_nothing():
    """mmdet's are torchvision's times 255."""
    student, teacher = NORMALIZED["mmdet"](4), NORMALIZED["torchvision"](6)
    distiller = Distiller(student, teacher, Seen(), LEVELS, shared_input="backbone")
    seen = Inputs(teacher.backbone)
    distiller(images())
    assert torch.equal(seen[0], images())


@pytest.mark.parametrize("numbers", [1, 3])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 5), (1, 2, 3, 4, 5), (3,)], ids=str)
def test_what_has_no_four_dimensions_is_no_image(numbers, shape):
    ours, theirs = (Normalization((mean,) * numbers, (2.0,) * numbers) for mean in (0.0, 0.5))
    values = torch.ones(shape)
    assert Renormalize(ours, theirs)(values) is values


@pytest.mark.parametrize("ours", ["torchvision", "ssd"])
def test_convert_input_replaces_the_conversion(ours):
    student, teacher = NORMALIZED[ours](4), NORMALIZED["torchvision"](6)
    options = {"shared_input": "backbone", "convert_input": lambda shared: 2 * shared}
    distiller = Distiller(student, teacher, Seen(), LEVELS, **options)
    seen = Inputs(teacher.backbone)
    distiller(images())
    assert torch.equal(seen[0], 2 * images())


def test_one_batch_for_two_data_preprocessors_is_an_error():
    student, teacher = NORMALIZED["mmdet"](4), NORMALIZED["caffe"](6)
    said = (
        "`shared_input` must be given where the models' `data_preprocessor` normalise otherwise, "
        "such as 'backbone', or `teacher_forward` that does, got None."
    )
    raises(ValueError, lambda: build(student, teacher), said)
    build(student, NORMALIZED["mmdet"](6))
    build(student, teacher, shared_input="backbone")
    build(student, teacher, teacher_forward=call_teacher)


@pytest.mark.slow
@pytest.mark.one_graph
def test_conversion_calls_and_dtypes_compile_to_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    sides = {
        "student_forward": lambda model, batch, view: model(batch[0]),
        "teacher_forward": lambda model, batch, view: model(view["pixels"]),
    }
    student, teacher = NORMALIZED["ssd"](4).float(), NORMALIZED["torchvision"](6)
    made = [
        Distiller(student, teacher, distillation_loss().float(), LEVELS, shared_input="backbone"),
        Distiller(student, teacher, distillation_loss().float(), LEVELS, **sides),
    ]
    for distiller, batch in zip(made, [(FLOAT,), ([FLOAT], {"pixels": FLOAT})], strict=True):
        _, expected = distiller(*batch)
        _, losses = torch.compile(distiller, fullgraph=True, backend=counter)(*batch)
        for name, value in losses.items():
            close(value, expected[name], 1e-6)
    assert counter.frame_count == len(made)


# --- a teacher in another dtype -------------------------------------------------------------------


class Batch(NamedTuple):
    pixels: torch.Tensor
    sizes: torch.Tensor


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


# --- a teacher that is left early -----------------------------------------------------------------


def call_teacher(teacher, batch):
    return teacher(batch)


CALLS = {
    "as the student": {},
    "shared input": {"shared_input": ""},
    "teacher_forward": {"teacher_forward": call_teacher},
}
each_call = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)


def values(distiller, batch):
    """The losses and their gradients."""
    _, losses = distiller(batch)
    trained = [value for value in distiller.parameters() if value.requires_grad]
    total = sum(losses.values())
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return [*losses.values(), *(value for value in found if value is not None)]


@each_call
def test_a_teacher_left_early_gives_what_a_whole_one_gives(options):
    distiller = make(early_stop=True, **options)
    whole = Distiller(
        copy.deepcopy(distiller.student),
        copy.deepcopy(distiller.teacher),
        copy.deepcopy(distiller.loss),
        LEVELS,
        **options,
    )
    ours, theirs = Inputs(distiller.student.head), Inputs(distiller.teacher.head)
    for seed in range(3):
        batch = images(seed=seed)
        for value, expected in zip(values(distiller, batch), values(whole, batch), strict=True):
            close(value, expected, 0.0)
    assert len(ours) == 3
    assert not theirs


def test_a_detector_left_early_runs_nothing_behind_its_last_tap():
    layers = {"c3": "backbone.body.6", "c4": "backbone.body.12"}
    student, teacher = detector("mobilenet").train(), detector("mobilenet").eval()
    distiller = Distiller(student, teacher, Seen(), layers, early_stop=True)
    behind = Inputs(teacher.backbone.body["13"])
    distiller(detector_images(), detector_targets())
    assert not behind
    expected = plain_hooks(teacher, layers.values(), lambda: teacher(detector_images()))
    for level, path in layers.items():
        assert torch.equal(distiller.loss.teacher[level], expected[path])


def is_at_rest(distiller):
    store = distiller._teacher_tap._store
    return not store.armed and store.wanted is None and not store.captured


@each_call
def test_nothing_stays_behind_a_teacher_left_early(options):
    distiller = make(early_stop=True, **options)
    distiller(images())
    assert is_at_rest(distiller)
    teacher = distiller.teacher
    close(teacher(images()), copy.deepcopy(teacher)(images()), 0.0)
    assert teacher(images()).requires_grad


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_of_the_teacher_passes_through(error):
    distiller = make(early_stop=True)
    fails = distiller.teacher.backbone.c2.register_forward_pre_hook(partial(fail, error))
    with pytest.raises(error, match="teacher"):
        distiller(images())
    assert is_at_rest(distiller)
    assert torch.is_grad_enabled()
    fails.remove()
    distiller(images())


def fail(error, module, args):
    raise error("teacher")


class SetsModes(Net):
    """Sets torch's modes by function call, and sets them back at the end."""

    def forward(self, batch):
        before = torch.get_autocast_dtype("cpu")
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_autocast_cache_enabled(False)
        output = super().forward(batch)
        torch.set_autocast_cache_enabled(True)
        torch.set_autocast_dtype("cpu", before)
        torch.set_autocast_enabled("cpu", False)
        torch.set_grad_enabled(False)
        return output


class SetsModesInside(Net):
    def forward(self, batch):
        with torch.enable_grad(), torch.autocast("cpu", torch.float16, cache_enabled=False):
            return super().forward(batch)


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("teacher", [SetsModes, SetsModesInside])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_torchs_modes_are_as_before_whatever_the_teacher_set(teacher, gradients, autocast):
    distiller = Distiller(Net(4), teacher(6), distillation_loss(), LEVELS, early_stop=True)
    inside = Inputs(distiller.teacher.head)
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        before = modes()
        distiller(images())
        assert modes() == before
    assert not inside


class SetsAutocast(nn.Module):
    """Has no weights, whose devices would be looked at."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()

    def forward(self, batch):
        torch.set_autocast_enabled("cpu", True)
        return self.body(batch)


def test_torchs_modes_are_as_before_a_model_without_weights():
    model, before = SetsAutocast(), modes()
    tap = FeatureTap(model, ["body"])
    with tap, stopped_after_last_capture(tap):
        model(images())
    assert modes() == before


def test_a_teacher_on_the_meta_device_is_left_early():
    student, teacher = Net(4).to("meta"), Net(6).to("meta")
    behind = Inputs(teacher.head)
    Distiller(student, teacher, Seen(), LEVELS, early_stop=True)(images().to("meta"))
    assert not behind


@pytest.mark.parametrize("path", ["backbone.c2.conv", "backbone.c2.norm"])
def test_an_in_place_operation_behind_the_last_tap_changes_nothing(path):
    layers = {"c1": "backbone.c1.norm", "c2": path}
    teacher = Net(6)
    distiller = Distiller(Net(4), teacher, Seen(), layers, early_stop=True)
    distiller(images())
    expected = plain_hooks(teacher, layers.values(), lambda: teacher(images()))
    for level, their_path in layers.items():
        close(distiller.loss.teacher[level], expected[their_path], 0.0)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_forward_is_left_with_the_last_call_that_is_expected(calls):
    head, rest = nn.Identity(), nn.Identity()
    runs = Inputs(head), Inputs(rest)
    model = nn.ModuleDict({"head": head, "rest": rest})

    def run():
        for _ in range(3):
            head(images())
        rest(images())

    tap = FeatureTap(model, {"p": "head"}, calls={"p": calls})
    with tap:
        with stopped_after_last_capture(tap):
            run()
        assert len(tap.pop()) == calls
    assert [len(inputs) for inputs in runs] == [calls, 0]


def test_a_forward_is_left_for_the_tap_that_has_it_all():
    model = Net()
    outer, inner = FeatureTap(model, ["backbone.c1"]), FeatureTap(model, ["backbone.c2"])
    with outer, stopped_after_last_capture(outer):
        with inner, stopped_after_last_capture(inner):
            model(images())
        pytest.fail("the inner context took the outer's")
    assert outer.pop().keys() == {"backbone.c1"}
    raises(RuntimeError, inner.pop, "got 0")


class RunsTwice(Net):
    def forward(self, batch):
        self.backbone.c1(batch)
        return super().forward(batch)


def test_a_tap_that_ran_too_often_before_the_last_one_is_an_error():
    distiller = Distiller(Net(4), RunsTwice(6), distillation_loss(), LEVELS, early_stop=True)
    raises(RuntimeError, lambda: distiller(images()), "'backbone.c1'", "got 2")
    assert is_at_rest(distiller)


class Guarded(Net):
    """Goes on after any error of its backbone."""

    def forward(self, batch):
        try:
            return super().forward(batch)
        except Exception:
            return self.head(batch.new_zeros(1, 12, 2, 2))


def test_no_teacher_takes_the_early_end_for_an_error():
    distiller = Distiller(Net(4), Guarded(6), distillation_loss(), LEVELS, early_stop=True)
    inside = Inputs(distiller.teacher.head)
    distiller(images())
    assert not inside


def test_the_copy_of_a_distiller_leaves_its_own_teacher_early():
    distiller = make(early_stop=True)
    duplicate = copy.deepcopy(distiller)
    heads = Inputs(distiller.teacher.head), Inputs(duplicate.teacher.head)
    duplicate(images())
    distiller(images())
    assert not any(heads)


def test_two_threads_leave_one_teacher_each_at_its_own_last_tap():
    teacher = Net(6).eval()
    layers = {"c1": "backbone.c1"}, {"c1": "backbone.c2"}
    distillers = [
        Distiller(Net(4), teacher, Seen(), each, early_stop=early_stop)
        for each, early_stop in zip(layers, (True, False), strict=True)
    ]
    together = threading.Barrier(2, timeout=20)

    def wait(module, args):
        together.wait()

    meet = teacher.backbone.c1.register_forward_pre_hook(wait)
    heads = Inputs(teacher.head)

    def run(index):
        distillers[index](images(seed=index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meet.remove()
    for index, distiller in enumerate(distillers):
        (path,) = layers[index].values()
        expected = plain_hooks(teacher, [path], partial(teacher, images(seed=index)))[path]
        close(distiller.loss.teacher["c1"], expected, 0.0)
        assert is_at_rest(distiller)
    assert len(heads) == 3


@pytest.mark.slow
@pytest.mark.one_graph
@pytest.mark.parametrize("part", ["teacher", "backbone", "distiller"])
def test_compiled_code_runs_to_its_end_and_gives_the_same(part, fresh_compiler):
    plain = make()
    student, teacher, loss = copy.deepcopy((plain.student, plain.teacher, plain.loss))
    counter = CompileCounterWithBackend("aot_eager")
    if part == "backbone":
        teacher.backbone.compile(fullgraph=True, backend=counter)
    elif part == "teacher":
        teacher = torch.compile(teacher, fullgraph=True, backend=counter)
    distiller = Distiller(student, teacher, loss, LEVELS, early_stop=True)
    distiller.teacher.eval()
    call = distiller
    if part == "distiller":
        call = torch.compile(distiller, fullgraph=True, backend=counter)
    for seed in range(2):
        _, expected = plain(images(seed=seed))
        for name, value in call(images(seed=seed))[1].items():
            close(value, expected[name], 1e-10)
    assert counter.frame_count == 1


# --- copies ---------------------------------------------------------------------------------------


def by_torch_save(distiller):
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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


class Checkpointed(Net):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, images):
        images = images.requires_grad_()
        return self.head(checkpoint(self.backbone, images, use_reentrant=self.use_reentrant))


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
HF_STAGES = {
    "c3": "model.backbone.model.encoder.stages.1",
    "c4": "model.backbone.model.encoder.stages.2",
}
PYRAMID = {"p3": "backbone[0]", "p4": "backbone[1]"}
detections = detector_images(), detector_targets()
pixels = (images().float().repeat(1, 1, 4, 4),)

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


# --- misuse ---------------------------------------------------------------------------------------

TWICE = Net(4)


def build(student=None, teacher=None, loss=None, layers=LEVELS, **options):
    return Distiller(student or Net(4), teacher or Net(6), loss or Seen(), layers, **options)


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
    said = "must carry a gradient, got a frozen part of the student", "unfreeze it, or leave this"
    raises(RuntimeError, lambda: distiller(images()), "`layers['c1']`", *said)


def test_another_teacher_wants_another_distiller():
    distiller = make()
    with pytest.raises(AttributeError, match="make a new Distiller"):
        distiller.teacher = make().teacher


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


def test_a_loss_of_one_level_takes_any_name_for_it():
    from featkd import ONE_STAGE, FeatureDistillationLoss

    loss = FeatureDistillationLoss(8, 12, hyperparameters=ONE_STAGE).double()
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU()).double() for c in (8, 12))
    _, losses = Distiller(student, teacher, loss, {"anything": "1"})(images())
    assert losses["loss_attention_masked"] > 0
    with pytest.raises(ValueError, match="`layers` must have the levels of `loss`"):
        Distiller(student, teacher, loss, {"a": "0", "b": "1"})
