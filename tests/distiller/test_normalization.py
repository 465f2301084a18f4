"""Two models that normalise their images in two ways see the same pixels."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel

from featkd import Distiller
from featkd.distiller.normalization import Normalization, Renormalize
from tests.helpers.distilled import FLOAT, Inputs, Seen, build, call_teacher
from tests.helpers.models import (
    LEVELS,
    Net,
    detector,
    detector_images,
    distillation_loss,
    images,
    raises,
)
from tests.helpers.tensors import close

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


SAID = "he teacher normalises its images and the student does not say how it does"
ONE_SIDED = {
    "the teacher says it": (None, "torchvision", "backbone", True),
    "mmdet's teacher says it": (None, "mmdet", "backbone", True),
    "the teacher says it of no image": (None, "torchvision", "backbone.c2", False),
    "the student says it": ("ssd", None, "backbone", False),
    "both say it": ("ssd", "torchvision", "backbone", False),
    "neither says it": (None, None, "backbone", False),
}


@pytest.mark.parametrize(("ours", "theirs", "path", "noted"), ONE_SIDED.values(), ids=ONE_SIDED)
def test_pixels_that_the_teacher_alone_says_how_to_normalise_are_noted(
    ours, theirs, path, noted, caplog
):
    kinds = NORMALIZED | {None: Net}
    layers, options = {"c2": "backbone.c2"}, {"shared_input": path}
    for convert in (None, lambda pixels: pixels):
        student, teacher = kinds[ours](4), kinds[theirs](4)
        caplog.clear()
        distiller = Distiller(student, teacher, Seen(), layers, convert_input=convert, **options)
        distiller(images())
        expected = noted and convert is None
        assert (SAID in caplog.text) == expected
        assert (SAID in str(distiller.report(images()))) == expected


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
