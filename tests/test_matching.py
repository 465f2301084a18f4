"""match_layers: stages of two models paired by stride, and one training step on what it found."""

import dataclasses
import re
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from featkd import Distiller, FeatureDistillationLoss, FeatureTap, from_channels_last, match_layers
from tests.helpers.models import (
    DETECTORS,
    NORMALIZED,
    Net,
    detector,
    detector_images,
    detector_targets,
    detr,
    hook_count,
    raises,
    rt_detr,
    snapshot,
    timm_backbone,
    unchanged,
)
from tests.helpers.staged import (
    PIXELS,
    CallsItsStages,
    check,
    convolution,
    convolutions,
    levels_of,
    stages,
)

RESNET = stages("backbone.body.layer{}", (1, 2, 3, 4))
HF_RESNET = stages("model.backbone.model.encoder.stages.{}", range(4))
# The last block at each stride: what the models' own feature pyramids take.
STAGES = {
    "fasterrcnn": RESNET,
    "retinanet": RESNET,
    "fcos": RESNET,
    "mobilenet": stages("backbone.body.{}", (3, 6, 12, 16)),
    "ssdlite": stages("backbone.features.{}", ("0.3", "0.6", "0.13", "1")),
    "ssd": {"c3": "backbone.features.22", "c4": "backbone.extra.0", "c5": "backbone.extra.1"},
    "detr": HF_RESNET,
    "rt_detr": HF_RESNET,
    "resnet18": stages("layer{}", (1, 2, 3, 4)),
    "regnetx_002": stages("s{}", (1, 2, 3, 4)),
    "convnext_atto": stages("stages_{}", range(4)),
    "efficientnet_lite0": stages("blocks.{}", (1, 2, 4, 6)),
    "mobilenetv3_small_050": stages("blocks.{}", (0, 1, 3, 5)),
}


def make(name, widths=(8, 8, 16, 16)):
    """The model, and its inputs for a training step: arguments and keywords."""
    if name in DETECTORS:
        return detector(name), (detector_images(), detector_targets())
    if name == "detr":
        return detr(*widths), (PIXELS,)
    if name == "rt_detr":
        return rt_detr(*widths), (PIXELS,)
    return timm_backbone(name), (PIXELS.expand(2, -1, -1, -1),)


def cases(rows):
    """Rows that begin with the names of models; those from beyond torchvision are marked."""
    return [
        pytest.param(*row, marks=[pytest.mark.model_zoo] if {*row[:2]} - {*DETECTORS} else [])
        for row in rows
    ]


@pytest.mark.parametrize("name", cases((name,) for name in STAGES))
def test_the_stages_of_a_model(name):
    model, (example, *_) = make(name)
    check(match_layers(model, model, example), STAGES[name], STAGES[name])


CROSS = [
    ("mobilenet", "fasterrcnn"),
    ("mobilenet", "retinanet"),
    ("ssdlite", "fasterrcnn"),
    ("fcos", "fasterrcnn"),
    ("detr", "rt_detr"),
    ("mobilenetv3_small_050", "resnet18"),
    ("efficientnet_lite0", "convnext_atto"),
]


@pytest.mark.parametrize(("ours", "theirs"), cases(CROSS))
def test_the_pairs_of_two_families(ours, theirs):
    (student, (example, *_)), (teacher, _) = make(ours), make(theirs)
    check(match_layers(student, teacher, example), STAGES[ours], STAGES[theirs])


TRAINED = [
    ("fasterrcnn", "fasterrcnn", "backbone"),
    ("retinanet", "fasterrcnn", "backbone"),
    ("fcos", "retinanet", "backbone"),
    ("mobilenet", "fasterrcnn", "backbone"),
    ("ssdlite", "mobilenet", "backbone"),
    ("detr", "detr", None),
    ("rt_detr", "rt_detr", None),
    ("mobilenetv3_small_050", "resnet18", None),
    ("regnetx_002", "convnext_atto", None),
]


def training_loss(output):
    """The detector's own losses, or the mean square of what it puts out."""
    if isinstance(output, dict) and "logits" not in output:
        return sum(output.values())
    tensors = [output["logits"]] if isinstance(output, dict) else output
    return sum(tensor.square().mean() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs", "shared_input"), cases(TRAINED))
def test_a_training_step_on_the_pairs(ours, theirs, shared_input):
    (student, inputs), (teacher, _) = make(ours), make(theirs, (8, 16, 16, 32))
    student.train().requires_grad_(True)  # transformers freezes DETR's backbone
    match = match_layers(student, teacher, inputs[0])
    proposed = {**match.pairs, **match.others}
    levels = [level for level in ("p3", "p5", "c3", "c4") if level in proposed]
    match = match.select(*levels)
    loss = FeatureDistillationLoss(
        match.student_channels,
        match.teacher_channels,
        hyperparameters=NORMALIZED,
        resize="bilinear",
    )
    distiller = Distiller(student, teacher, loss, match.layers, shared_input=shared_input)
    optimizer = torch.optim.SGD(distiller.parameters(), 1e-4)
    teacher_before, student_before = snapshot(teacher), snapshot(student)
    output, losses = distiller(*inputs)
    total = training_loss(output) + sum(losses.values())
    assert total.isfinite()
    total.backward()
    optimizer.step()
    assert levels
    assert unchanged(teacher, teacher_before)
    assert not unchanged(student, student_before)


# --- the models stay as they were -----------------------------------------------------------------


def test_modes_state_hooks_and_gradients_are_left_as_they_were():
    student, teacher = Net(4).train(), Net(6).eval()
    student.backbone.c1.norm.eval()
    teacher.head.train()
    modes = [[module.training for module in model.modules()] for model in (student, teacher)]
    before = snapshot(student), snapshot(teacher)
    match_layers(student, teacher, PIXELS.double())
    assert modes == [[module.training for module in m.modules()] for m in (student, teacher)]
    assert unchanged(student, before[0])
    assert unchanged(teacher, before[1])
    assert hook_count(student) == hook_count(teacher) == 0
    assert torch.is_grad_enabled()


class Counting(nn.Module):
    """Counts its calls in any mode, and draws."""

    def __init__(self):
        super().__init__()
        self.net = Net(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return self.net(images + torch.rand_like(images))


def test_what_a_model_counts_and_draws_is_left_as_it_was():
    student, teacher = Counting(), Net(6)
    drawn = torch.get_rng_state()
    match_layers(student, teacher, PIXELS.double())
    assert student.calls == 0
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_failing_model_is_left_as_it_was():
    student, teacher = Net(4).train(), Net(6).train()
    with pytest.raises(ValueError, match=r"`student` must run .* got RuntimeError: .*channels"):
        match_layers(student, teacher, PIXELS.double()[:, :2])
    assert all(module.training for module in student.modules())
    assert hook_count(student) == hook_count(teacher) == 0


# --- what is listed, paired and printed -----------------------------------------------------------


def test_every_listed_layer_can_be_tapped_and_has_the_shape_it_says():
    model = Net(4)
    match = match_layers(model, Net(6), PIXELS.double())
    paths = [layer.path for layer in match.student]
    assert set(paths) == {path for path, _ in model.named_modules()} - {""}
    with FeatureTap(model, paths) as tap:
        model(PIXELS.double())
        features = tap.pop()
    assert [tuple(feature.shape) for feature in features.values()] == [
        layer.shape for layer in match.student
    ]


def test_a_stage_is_the_whole_block_with_its_stride():
    match = match_layers(Net(4).backbone, Net(6).backbone, PIXELS.double())
    check(match, {"c1": "c1", "c2": "c2"}, {"c1": "c1", "c2": "c2"})
    assert match.student_channels == {"c1": 4, "c2": 8}
    assert match.teacher_channels == {"c1": 6, "c2": 12}


def test_a_block_of_one_step_is_the_stage_and_not_the_step():
    """A stem that shrinks its map by more than 2 is looked into."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), nn.Conv2d(8, 8, 2, 2))
    assert match_layers(model, model, PIXELS).layers == {"c2": ("0", "0"), "c3": ("1", "1")}
    by_3 = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.AdaptiveAvgPool2d((32, 32))))
    assert levels_of(by_3, torch.zeros(1, 3, 96, 96)) == {"c1": "0.0", "stride3": "0.1"}


def test_maps_of_the_images_own_size_are_no_stages():
    """Put out by a step, or in the list of a backbone."""
    plain = nn.Sequential(convolution(3, 8), convolution(8, 8, 2))
    assert match_layers(plain, plain, PIXELS).layers == {"c1": ("1", "1")}
    listed = WithDetails()
    assert match_layers(listed, listed, PIXELS).layers == {"c1": ("halve", "halve")}


class WithDetails(nn.Module):
    """Puts out a map of the image's size beside its last one."""

    def __init__(self):
        super().__init__()
        self.halve = convolution(3, 8, 2)

    def forward(self, x):
        return [x - x.mean(), self.halve(x)]


def test_only_strides_of_both_models_are_paired():
    match = match_layers(convolutions(2, 2, 2), convolutions(4, 4), PIXELS)
    assert match.layers == {"c2": ("1", "0")}


class AllItsMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = convolutions(1, 2)

    def forward(self, x):
        first = self.convs[0](x)
        return [first + 1, self.convs[1](first)]


@pytest.mark.parametrize("model", [convolutions(1, 2), AllItsMaps()], ids=["plain", "list"])
def test_what_keeps_the_image_s_size_is_no_stage(model):
    match = match_layers(model, model, PIXELS)
    assert list(match.layers) == ["c1"]
    assert len(match.student) > 1


def test_without_a_common_stride_the_table_says_so():
    match = match_layers(convolutions(2), convolutions(4), PIXELS)
    assert not match.pairs
    assert str(match).startswith(
        "No layers of one stride: the student's stages have 2, the teacher's 4. Where a model "
    )


def test_without_a_stage_the_table_says_so():
    match = match_layers(convolutions(2), convolutions(1), PIXELS)
    assert "the student's stages have 2, the teacher's none. Where" in str(match)


def test_a_stride_that_is_no_power_of_2_is_named_by_its_value():
    model = convolutions(14)
    assert match_layers(model, model, PIXELS.new_zeros(1, 3, 224, 224)).layers == {
        "stride14": ("0", "0")
    }


@pytest.mark.parametrize("height", [100, 97, 104])
def test_the_rounding_of_a_strided_convolution_keeps_the_stride(height):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3)))
    match = match_layers(model, model, torch.zeros(1, 3, height, 64))
    assert match.layers == {"c1": ("0", "0"), "c2": ("1", "1"), "c3": ("2", "2")}


class RunsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.once = nn.Conv2d(3, 3, 2, 2)
        self.twice = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.twice(self.twice(self.once(x)))


def test_a_module_that_runs_twice_is_not_listed():
    match = match_layers(RunsTwice(), RunsTwice(), PIXELS)
    assert [layer.path for layer in match.student] == ["once"]
    assert match.layers == {"c1": ("once", "once")}


def test_a_part_that_restores_the_resolution_is_looked_into():
    model = nn.ModuleDict({"unet": nn.Sequential(*convolutions(2), nn.Upsample(scale_factor=2))})
    model.forward = lambda x: model["unet"](x)
    assert match_layers(model, model, PIXELS).layers == {"c1": ("unet.0", "unet.0")}


def test_the_backbone_ends_where_several_maps_go_in():
    match = match_layers(CallsItsStages(), CallsItsStages(), PIXELS)
    assert match.layers == {"c1": ("c1", "c1"), "c2": ("c2", "c2")}


@pytest.mark.model_zoo
@pytest.mark.parametrize("size", [(64, 96), (96, 160), (224, 224)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_a_classifier_s_pooling_is_no_stage(name, size):
    import timm

    classifier = timm.create_model(name, pretrained=False)
    teacher = torchvision.models.resnet18(weights=None)
    match = match_layers(classifier, teacher, torch.rand(1, 3, *size))
    assert list(match.layers) == ["c1", "c2", "c3", "c4", "c5"]


def test_the_text_is_a_table_of_the_pairs_and_all_of_both_models_layers():
    match = match_layers(Net(4).backbone, Net(6).backbone, PIXELS.double())
    pairs, last = str(match).split("\n\n")
    assert [re.split(r"\s{2,}", line) for line in pairs.splitlines()] == [
        ["level", "stride", "student", "shape", "teacher", "shape"],
        ["c1", "2", "c1", "1 x 4 x 32 x 48", "c1", "1 x 6 x 32 x 48"],
        ["c2", "4", "c2", "1 x 8 x 16 x 24", "c2", "1 x 12 x 16 x 24"],
    ]
    assert last == "`print(match.all)` lists each model's layers."
    student, teacher = (
        [re.split(r"\s{2,}", line) for line in part.splitlines()]
        for part in match.all.split("\n\n")
    )
    for name, width, table in (("student", 4, student), ("teacher", 6, teacher)):
        assert table[0] == [f"{name}'s path", "shape", "stride", "channels"]
        assert ["c1", f"1 x {width} x 32 x 48", "2", str(width)] in table
        assert ["c2.conv", f"1 x {2 * width} x 16 x 24", "4", str(2 * width)] in table
    assert teacher[-1] == ["c2", "1 x 12 x 16 x 24", "4", "12"]
    for part in (pairs, *match.all.split("\n\n")):
        header, *rows = part.splitlines()
        starts = {row.index(" x ") // 2 for row in rows}
        assert len(starts) == 1, part
        assert "shape" in header


class Predicts(nn.Module):
    """A user's module around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


WRAPS = [
    pytest.param(Predicts, id="a user's"),
    pytest.param(lambda model: Predicts(nn.Sequential(model)), id="two"),
    pytest.param(AveragedModel, id="an average"),
    pytest.param(lambda model: torch.compile(model, backend="eager"), id="compiled"),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_wraps_a_model_changes_none_of_its_stages(wrap):
    model = Net(4)
    ours, theirs = match_layers(wrap(model), model, PIXELS.double()).pairs["c2"]
    assert theirs.path == "backbone.c2"
    assert ours.path.endswith(f".{theirs.path}")
    assert ours.channels == theirs.channels == 8


def test_a_model_compiled_as_one_graph_is_traced_without_it_or_is_an_error():
    model = torch.compile(Net(4), backend="eager", fullgraph=True)
    can_do_without = hasattr(torch.compiler, "set_stance")
    with nullcontext() if can_do_without else pytest.raises(ValueError, match="must run on"):
        assert "c2" in match_layers(model, Net(6), PIXELS.double()).layers


def test_a_teacher_of_another_dtype_gets_the_example_in_its_own():
    half = Net(6).bfloat16()
    assert match_layers(Net(4), half, PIXELS.double()).pairs.keys() == {"c1", "c2"}
    assert next(half.parameters()).dtype == torch.bfloat16


class Resizes(Net):
    """Takes a list of images, as torchvision's detectors do, and every other pixel of them."""

    def __init__(self, width, step):
        super().__init__(width)
        self.step = step

    def forward(self, images):
        return super().forward(torch.stack(images)[..., :: self.step, :: self.step])


def test_pairs_of_other_sizes_are_said_to_want_a_shared_input():
    said = "with `shared_input` they do not."
    image = [PIXELS[0].double()]
    assert said in str(match_layers(Resizes(4, 1), Resizes(6, 2), image))
    assert said not in str(match_layers(Resizes(4, 2), Resizes(6, 2), image))


class TakesTargets(Net):
    def forward(self, images, targets):
        return super().forward(images)


def test_a_batch_given_as_one_argument_is_an_error_whose_advice_works():
    batch = (PIXELS.double(), ["targets"])
    with pytest.raises(ValueError, match=r"each as an argument of its own \(`\*batch`\)"):
        match_layers(TakesTargets(4), TakesTargets(6), batch)
    assert "c2" in match_layers(TakesTargets(4), TakesTargets(6), *batch).layers


def nested(module, depth):
    for _ in range(depth):
        module = nn.Sequential(module)
    return module


@pytest.mark.parametrize(("stride", "shown"), [(2, 2), (1, 4)], ids=["a stage", "no stage"])
def test_a_listing_leaves_out_what_lies_deeper_than_a_stages_blocks(stride, shown):
    model = nested(convolution(3, 3, stride), 5)
    listing, _ = match_layers(model, model, PIXELS).all.split("\n\n")
    _, *rows, last = listing.splitlines()
    assert [row.split()[0] for row in rows] == [
        ".".join("0" * (i + 1)) for i in reversed(range(shown))
    ]
    assert last == f"({5 - shown} deeper layers in `.student`)"


def test_the_tables_of_real_detectors_fit_a_screen():
    mobilenet, resnet = detector("mobilenet"), detector("fasterrcnn")
    match = match_layers(mobilenet, resnet, detector_images())
    for text, lines in ((str(match), 16), (match.all, 120)):
        assert all(len(line) <= 120 for line in text.splitlines())
        assert len(text.splitlines()) < lines
    first, word, others, _ = str(match).split("\n\n")
    assert [line.split()[0] for line in first.splitlines()] == ["level", "p5", "p6"]
    assert word == "`select` takes these as well:"
    assert [line.split()[0] for line in others.splitlines()] == [
        "level",
        "c1",
        "c2",
        "c3",
        "c4",
        "c5",
    ]


# --- misuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "call", "mention"),
    [
        (
            TypeError,
            lambda: match_layers("net", Net(), PIXELS),
            "`student` must be an nn.Module, got str",
        ),
        (TypeError, lambda: match_layers(Net().float(), None, PIXELS), "`teacher`"),
        (ValueError, lambda: match_layers(nn.Flatten(), nn.Flatten(), PIXELS), "`student`"),
        (ValueError, lambda: match_layers(convolutions(2), nn.Linear(96, 2), PIXELS[0]), "student"),
    ],
    ids=["a string", "None", "no feature map", "no batch"],
)
def test_misuse(error, call, mention):
    raises(error, call, mention)


class ChannelsLast(nn.Module):
    def forward(self, features):
        return features.permute(0, 2, 3, 1).contiguous()


CHANNELS_LAST = nn.Sequential(nn.Conv2d(3, 96, 4, 4), ChannelsLast())


@pytest.mark.parametrize("height", [64, 97])
def test_channels_last_maps_are_listed_as_such(height):
    match = match_layers(CHANNELS_LAST, CHANNELS_LAST, torch.zeros(1, 3, height, 64))
    plain, channels_last = match.student
    assert plain.shape == channels_last.shape == (1, 96, height // 4, 16)
    assert plain.stride == channels_last.stride == 4
    assert (plain.channels_last, channels_last.channels_last) == (False, True)
    assert match.layers == {"c2": ("1", "1")}
    assert match.student_channels == {"c2": 96}
    assert f"1 x {height // 4} x 16 x 96 (B, H, W, C)" in str(match)


def test_what_is_to_be_converted_goes_from_the_match_into_the_distiller():
    match = match_layers(CHANNELS_LAST, convolutions(4), PIXELS)
    assert match.convert == {"c2": (from_channels_last, None)}
    assert match_layers(convolutions(4), CHANNELS_LAST, PIXELS).convert == {
        "c2": (None, from_channels_last)
    }
    loss = FeatureDistillationLoss(
        match.student_channels, match.teacher_channels, hyperparameters=NORMALIZED
    )
    distiller = Distiller(CHANNELS_LAST, convolutions(4), loss, match.layers, convert=match.convert)
    _, losses = distiller(PIXELS)
    sum(losses.values()).backward()
    assert CHANNELS_LAST[0].weight.grad.abs().sum() > 0


def test_what_needs_no_conversion_gives_an_empty_one():
    model = convolutions(4)
    assert match_layers(model, model, PIXELS).convert == {}


@pytest.mark.parametrize("channels", [16, 15, 17])
def test_a_map_that_both_layouts_fit_is_read_with_the_channels_first(channels):
    model = nn.Sequential(nn.Conv2d(3, channels, 4, 4))
    (layer,) = match_layers(model, model, torch.zeros(1, 3, 64, 64)).student
    assert layer.shape == (1, channels, 16, 16)
    assert not layer.channels_last


def test_height_and_width_that_differ_tell_the_layouts_apart():
    """At 224 x 320, Swin's first stage is (1, 56, 80, 96): of about one stride across and down."""
    images = torch.zeros(1, 3, 224, 320)
    match = match_layers(CHANNELS_LAST, CHANNELS_LAST, images)
    assert match.student[1].shape == (1, 96, 56, 80)


def test_tokens_are_not_listed():
    model = nn.Sequential(nn.Conv2d(3, 96, 4, 4), nn.Flatten(2))
    match = match_layers(model, model, PIXELS)
    assert [layer.path for layer in match.student] == ["0"]


@pytest.mark.model_zoo
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("size", [(64, 96), (64, 64)])
def test_the_stages_of_a_swin_transformer(name, size):
    import timm

    model = timm.create_model(name, pretrained=False, features_only=True, img_size=size)
    match = match_layers(model, model, torch.zeros(1, 3, *size))
    check(match, stages("layers_{}", range(4)), stages("layers_{}", range(4)))
    assert list(match.convert) == list(match.layers) == ["c2", "c3", "c4", "c5"]


def test_torchvisions_swin_transformer():
    model = torchvision.models.swin_t(weights=None)
    expected = stages("features.{}", (1, 3, 5))
    match = match_layers(model, model, PIXELS).select(*expected)
    check(match, expected, expected)
    assert match.convert == dict.fromkeys(expected, (from_channels_last, from_channels_last))


@pytest.mark.model_zoo
def test_an_example_may_be_given_by_name():
    student, teacher = detr(8, 8, 16, 16), rt_detr(8, 8, 16, 16)
    match = match_layers(student, teacher, pixel_values=PIXELS, output_hidden_states=False)
    assert match == match_layers(student, teacher, PIXELS)
    assert match.pairs


def test_strides_count_from_the_first_map_that_goes_in():
    """Not from the largest: a channels-last map may be wider than the image."""
    wide = nn.Sequential(nn.Conv2d(3, 512, 4, 4), ChannelsLast(), nn.LayerNorm(512))
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 3, 1), wide)
    match = match_layers(model, model, torch.zeros(1, 3, 64, 64))
    assert match.layers["c1"] == ("1", "1")
    assert match.student[0].stride == 2


def test_select_keeps_the_named_levels():
    models = [nn.Sequential(nn.Conv2d(3, c, 2, 2), nn.Conv2d(c, c, 2, 2)) for c in (4, 8)]
    match = match_layers(*models, torch.zeros(1, 3, 16, 16))
    assert list(match.layers) == ["c1", "c2"]
    assert match.select("c2").layers == {"c2": ("1", "1")}
    assert match.select("c2").student == match.student
    with pytest.raises(ValueError, match=r"`levels` must be among \['c1', 'c2'\], got 'c9'"):
        match.select("c9")
    nothing = dataclasses.replace(match, pairs={})
    with pytest.raises(
        ValueError, match=r"among \[\], got 'c1'\. No layers of one stride: .*resizes"
    ):
        nothing.select("c1")
    with pytest.raises(ValueError, match=r"got 'p3'\. No outputs of FPNs are paired: take stages"):
        match.select("p3")
    with pytest.raises(TypeError, match=r"`levels` must be strings, each an argument, got int\."):
        match.select(2)
    for levels in ((), ("c2", "c2")):
        with pytest.raises(ValueError, match="at least one, each once"):
            match.select(*levels)
