"""match_layers: stages of two models paired by stride, and one training step on what it found."""

import itertools
import re

import pytest
import torch
import torchvision
from torch import nn

from featkd import (
    Distiller,
    FeatureDistillationLoss,
    FeatureTap,
    from_channels_last,
    match_layers,
)
from featkd.taps.trace import Call, FeatureMap, first_image, read_maps, stride_of, trace
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
    watch,
)
from tests.helpers.tensors import normal

PIXELS = normal(1, 3, 64, 96, dtype=torch.float32)


def stages(pattern, names, first=2):
    return {f"c{first + index}": pattern.format(name) for index, name in enumerate(names)}


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


def check(match, ours, theirs):
    """Equal strides by name, by value and by size, and the layers that are expected."""
    proposed = {**match.pairs, **match.others}
    match = match.select(*proposed)
    for level, (student, teacher) in proposed.items():
        assert student.stride == teacher.stride == 2 ** int(level[1:])
        assert student.shape[1] == student.channels == match.student_channels[level]
        assert teacher.shape[1] == teacher.channels == match.teacher_channels[level]
        assert match.layers[level] == (student.path, teacher.path)
    found = {level: match.layers[level] for level in ours if level in match.layers}
    assert found == {level: (ours[level], theirs[level]) for level in ours if level in theirs}


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


def test_a_failing_model_is_left_as_it_was():
    student, teacher = Net(4).train(), Net(6).train()
    with pytest.raises(RuntimeError, match="channels"):
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


def convolutions(*strides):
    return nn.Sequential(*(nn.Conv2d(3, 3, stride, stride) for stride in strides))


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
    assert str(match).startswith("No layers of one stride.\n\n`print(match.all)`")


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


class Pyramid(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.lateral = nn.Conv2d(width, 3, 1)

    def forward(self, maps):
        return self.lateral(maps[1])


class CallsItsStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = convolutions(2, 2)
        self.neck = Pyramid()

    def forward(self, x):
        first = self.c1(x)
        return self.neck([first, self.c2(first)])


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
    assert last == "`print(match.all)` lists every layer that can be tapped."
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


# --- strides, maps of the image, and the calls of one forward -------------------------------------


@pytest.mark.parametrize(
    ("shape", "pixels", "stride"),
    [
        ((1, 8, 13, 5), (1, 3, 100, 40), 8.0),  # a strided convolution rounds up
        ((1, 8, 12, 5), (1, 3, 100, 40), 8.0),
        ((1, 8, 11, 5), (1, 3, 96, 40), 8.73),
        ((1, 8, 34, 5), (1, 3, 100, 40), 2.94),
        ((1, 8, 16, 5), (1, 3, 224, 40), 14.0),
        ((1, 8, 1, 5), (1, 3, 1, 40), 1.0),
        ((1, 8, 128, 5), (1, 3, 64, 40), 0.5),
    ],
)
def test_the_stride_is_told_by_the_heights(shape, pixels, stride):
    assert stride_of(shape, pixels) == stride


@pytest.mark.parametrize(
    ("shape", "is_map"),
    [
        ((2, 500, 16, 24), True),
        ((2, 500, 14, 22), True),  # two unpadded convolutions
        ((2, 500, 17, 25), True),
        ((2, 500, 14, 25), False),  # more than one stride can leave
        ((2, 500, 16, 12), False),
        ((2, 500, 8, 24), False),
        ((2, 500, 1, 1), True),
        ((1, 500, 16, 24), False),
        ((3, 500, 16, 24), False),
    ],
)
def test_a_map_of_the_image_shrinks_alike_both_ways(shape, is_map):
    call = Call("", 0, put_out=[FeatureMap(shape, (), 1)], taken_in=[FeatureMap(shape, (), 1)])
    read_maps([call], (2, 3, 64, 96))
    assert [found.shape for found in call.put_out] == [shape] * is_map
    assert [found.shape for found in call.taken_in] == [shape] * is_map


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Mixture()

    def forward(self, x, *, y):
        return self.part([x, y])


class Mixture(nn.Module):
    """Puts out maps and what is none: tokens, a mask, an empty map, a video."""

    def forward(self, pair):
        first, second = pair
        return {
            "same": first,
            4: (first + 1, [second]),
            "tokens": first.flatten(2),
            "mask": first > 0,
            "empty": first[:0],
            "video": first[None],
        }


def test_a_map_of_one_row_has_the_stride_of_its_width():
    call = Call("", 0, put_out=[FeatureMap((2, 5, 1, 6), (), 1)])
    read_maps([call], (2, 3, 8, 96))
    assert len(call.put_out) == 1


def test_the_calls_of_a_forward():
    ended = []
    x, y = torch.ones(2, 1, 4, 6), torch.ones(2, 5, 4, 6)
    root = trace(Outer(), (x,), {"y": y}, ended)
    part, outer = ended
    assert list(root.within()) == [root, outer, part]
    assert [call.path for call in ended] == ["part", ""]
    assert [(call.began, call.ended) for call in ended] == [(1, 2), (0, 2)]
    assert (root.path, root.began, root.ended) == ("", -1, 2)
    assert root.leaves == outer.leaves == part.leaves == 1
    image, other = outer.taken_in
    assert (image.shape, other.shape) == (tuple(x.shape), tuple(y.shape))
    assert (image.keys, other.keys) == (("0", "0"), ("1", "y"))
    assert [found.keys for found in part.taken_in] == [("0", "0", "0"), ("0", "0", "1")]
    assert [found.selector for found in part.put_out] == ["[same]", "[4][0]", "[4][1][0]"]
    assert image.serial != other.serial
    same, new, second = (found.serial for found in part.put_out)
    assert [found.serial for found in part.taken_in] == [image.serial, other.serial]
    assert (same, second) == (image.serial, other.serial)
    assert new not in (same, second)
    assert (part.tokens_in, part.tokens_out) == (set(), {(2, 1, 24)})


def test_the_first_map_is_the_image():
    call = Call("", 0, inner=[Call("a", 1), Call("b", 2)])
    assert first_image(call) == (0, 0, 0, 0)
    for inner, shape in zip(call.inner, [(1, 3, 4, 6), (1, 8, 2, 3)], strict=True):
        inner.taken_in = [FeatureMap(shape, (), 1)]
    assert first_image(call) == (1, 3, 4, 6)


# --- feature pyramids -----------------------------------------------------------------------------


def convolution(ours, theirs, stride=1):
    return nn.Conv2d(ours, theirs, 3, stride, 1)


class Stages(nn.Module):
    """Strides 2, 4, 8, each as wide as it says; puts out the last two in a list."""

    def __init__(self, *widths):
        super().__init__()
        pairs = itertools.pairwise((3, *widths))
        self.stages = nn.ModuleList(convolution(*pair, 2) for pair in pairs)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps[1:]


class FPN(nn.Module):
    """Puts out as many maps of one width as it takes in, and reversed where wanted."""

    def __init__(self, widths, out, extra=(), backwards=False):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, out, 1) for width in widths)
        self.out = nn.ModuleList(convolution(out, out) for _ in widths)
        self.extra = nn.ModuleList(convolution(out, out, stride) for stride in extra)
        self.backwards = backwards

    def forward(self, maps):
        found, above = [], 0
        for x, lateral, out in reversed(list(zip(maps, self.lateral, self.out, strict=True))):
            above = lateral(x) + (
                nn.functional.interpolate(above, size=x.shape[2:]) if found else 0
            )
            found.insert(0, out(above))
        for extra in self.extra:
            found.append(extra(found[-1]))
        return tuple(found[:: -1 if self.backwards else 1])


class Head(nn.Module):
    """Puts out two lists of maps, or one, as wide at each level as at the others."""

    def __init__(self, width, outputs):
        super().__init__()
        self.tower = nn.ModuleList([Tower(width)])
        self.outputs = nn.ModuleList(nn.Conv2d(width, 5, 1) for _ in range(outputs))

    def forward(self, maps):
        maps = self.tower[0](maps)
        found = [[output(x) for x in maps] for output in self.outputs]
        return found if len(found) > 1 else found[0]


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, maps):
        return [self.conv(x) for x in maps]


class Detector(nn.Module):
    def __init__(self, width, *, outputs=2, widths=(8, 8, 8), **options):
        super().__init__()
        self.backbone = Stages(*widths)
        self.neck = FPN(widths[1:], width, **options)
        self.head = Head(width, outputs)

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)))


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_an_fpn_puts_out_is_proposed_and_what_a_head_does_is_not(outputs, backwards):
    student = Detector(8, outputs=outputs, backwards=backwards, extra=(2,))
    teacher = Detector(16, widths=(8, 16, 32), outputs=outputs)
    match = match_layers(student, teacher, PIXELS)
    theirs = "neck[0]", "neck[1]"
    ours = ("neck[2]", "neck[1]") if backwards else theirs
    assert match.layers == {"p2": (ours[0], theirs[0]), "p3": (ours[1], theirs[1])}
    assert match.student_channels == {"p2": 8, "p3": 8}
    assert match.teacher_channels == {"p2": 16, "p3": 16}
    stages = {f"c{i + 1}": (f"backbone.stages.{i}",) * 2 for i in range(3)}
    assert {level: (a.path, b.path) for level, (a, b) in match.others.items()} == stages
    equals_plain_hooks(student, match, PIXELS)


def equals_plain_hooks(model, match, *inputs):
    """A tap of all that is proposed captures what plain hooks see."""
    layers = {level: ours.path for level, (ours, _) in {**match.pairs, **match.others}.items()}
    model = model.eval()
    tap = FeatureTap(model, layers)
    with watch(model, layers.values()) as expected, torch.no_grad(), tap:
        model(*inputs)
        captured = tap.pop()
    for level, path in layers.items():
        assert torch.equal(captured[level], expected[path])


class TwoWidths(FPN):
    """As YOLO's necks, whose levels differ in width."""

    def __init__(self):
        super().__init__((8, 8), 8)
        self.out[1] = convolution(8, 12)


def test_an_fpn_behind_the_backbone_may_have_levels_of_several_widths():
    model = nn.Sequential(Stages(8, 8, 8), TwoWidths(), Detect(8))
    match = match_layers(model, model, PIXELS)
    assert match.layers == {"p2": ("1[0]",) * 2, "p3": ("1[1]",) * 2}
    assert match.student_channels == {"p2": 8, "p3": 12}


def test_the_levels_of_two_lists_are_no_pyramid():
    class InTwo(FPN):
        def forward(self, maps):
            fine, coarse = super().forward(maps)
            return [fine], [coarse]

    class Ends(nn.Module):
        def forward(self, lists):
            return torch.cat([x.flatten(1) for (x,) in lists], 1)

    model = nn.Sequential(Stages(8, 8, 8), InTwo((8, 8), 8), Ends())
    assert list(levels_of(model)) == ["c1", "c2", "c3"]


def test_of_two_levels_at_one_stride_and_width_the_higher_is_taken():
    class Cropped(FPN):
        def forward(self, maps):
            fine, coarse = super().forward(maps)
            return fine, coarse, coarse[:, :, :-1]

    model = nn.Sequential(Stages(8, 8, 8), Cropped((8, 8), 8), Ends())
    assert levels_of(model, torch.zeros(1, 3, 61, 96)) == {"p2": "1[0]", "p3": "1[1]"}


def test_two_levels_at_one_stride_are_the_larger_then_the_last():
    match = match_layers(*(Detector(8, extra=(1,)) for _ in range(2)), PIXELS)
    assert match.layers == {"p2": ("neck[0]",) * 2, "p3": ("neck[2]",) * 2}


def test_a_pyramid_in_one_model_alone_leaves_the_stages():
    match = match_layers(Detector(8), Stages(8, 16, 32), PIXELS)
    assert list(match.layers) == ["c1", "c2", "c3"]
    assert not match.others


def test_pyramids_without_a_common_stride_leave_the_stages():
    coarse = nn.Sequential(convolution(3, 3, 2), convolution(3, 3, 2), Detector(8))
    match = match_layers(Detector(8), coarse, PIXELS)
    assert list(match.layers) == ["c1", "c2", "c3"]
    assert [layer.path for layer in match.teacher if layer.pyramid] == ["2.neck[0]", "2.neck[1]"]


def test_levels_of_both_kinds_can_be_selected_together():
    match = match_layers(Detector(8), Detector(8), PIXELS)
    mixed = match.select("c3", "p2")
    assert list(mixed.layers.items()) == [
        ("c3", ("backbone.stages.2",) * 2),
        ("p2", ("neck[0]",) * 2),
    ]
    assert list(mixed.others) == ["p3", "c1", "c2"]
    assert list(mixed.select("p3").layers) == ["p3"]


def test_equal_stages_are_no_pyramid():
    """At one width, and taken in together, but put out by the backbone itself."""
    model = nn.Sequential(Stages(8, 8, 8), Pyramid(8))
    assert list(match_layers(model, model, PIXELS).layers) == ["c1", "c2", "c3"]


def test_a_pyramid_that_nothing_takes_in_is_taken_for_a_head():
    model = nn.Sequential(Stages(8, 8, 8), FPN((8, 8), 5))
    assert list(match_layers(model, model, PIXELS).layers) == ["c1", "c2", "c3"]


class Ends(nn.Module):
    def forward(self, maps):
        return torch.cat([x.flatten(1) for x in maps], 1)


def test_an_fpn_may_be_all_that_puts_a_pyramid_out():
    model = nn.Sequential(Stages(8, 8, 8), FPN((8, 8), 8), Ends())
    assert match_layers(model, model, PIXELS).layers == {"p2": ("1[0]",) * 2, "p3": ("1[1]",) * 2}


class Projections(nn.Module):
    """One width for all levels: no pyramid yet."""

    def __init__(self, width):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, width, 1) for _ in range(2))

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.convs, maps, strict=True)]


def test_the_last_pyramid_before_the_head_is_proposed():
    model = nn.Sequential(Stages(8, 8, 8), Projections(8), FPN((8, 8), 8), Head(8, 2))
    assert match_layers(model, model, PIXELS).layers == {"p2": ("2[0]",) * 2, "p3": ("2[1]",) * 2}


class Auxiliary(Detector):
    """With a first pyramid, and a head on it that is there for training alone."""

    def __init__(self, width):
        super().__init__(width)
        self.project, self.auxiliary = Projections(8), Head(8, 2)

    def forward(self, x):
        maps = self.project(self.backbone(x))
        self.auxiliary(maps)
        return self.head(self.neck(maps))


def test_a_pyramid_right_behind_the_head_of_another_is_the_last():
    model = Auxiliary(8)
    assert match_layers(model, model, PIXELS).layers == {
        "p2": ("neck[0]",) * 2,
        "p3": ("neck[1]",) * 2,
    }


def test_levels_that_do_not_halve_are_no_pyramid():
    model = Detector(8, extra=(4,))
    assert list(match_layers(model, model, PIXELS).layers) == ["c1", "c2", "c3"]


def test_levels_of_strides_that_are_no_powers_of_2_are_no_pyramid():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 3), Detector(8))
    match = match_layers(model, model, torch.zeros(1, 3, 96, 96))
    assert list(match.layers) == ["stride3", "stride6", "stride12", "stride24"]


class Unbundled(nn.Module):
    """As Ultralytics' detectors are: each step a module, and a head that takes several maps."""

    def __init__(self, head=None):
        super().__init__()
        self.stages = Stages(8, 8, 8)
        self.up = nn.Upsample(scale_factor=2)
        self.fine = convolution(16, 6)
        self.down = convolution(6, 8, 2)
        self.coarse = convolution(16, 12)
        self.head = head or Detect()

    def forward(self, x):
        c2, c3 = self.stages(x)
        fine = self.fine(torch.cat((self.up(c3), c2), 1))
        return self.head([fine, self.coarse(torch.cat((self.down(fine), c3), 1))])


class Detect(nn.Module):
    """Puts out its inputs as well, beside what it finds."""

    def __init__(self, width=6):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, 5, 1), nn.Conv2d(12, 5, 1)])

    def forward(self, maps):
        found = [conv(x).flatten(2) for conv, x in zip(self.convs, maps, strict=True)]
        return torch.cat(found, 2), {"feats": maps}


@pytest.mark.parametrize(
    ("neck", "head", "path"),
    [(FPN((8, 8), 8), Head(8, 2), "0[{}]"), (TwoWidths(), Detect(8), "0.1[{}]")],
    ids=["one", "two"],
)
def test_a_module_of_backbone_and_neck_puts_out_a_pyramid_of_one_width(neck, head, path):
    model = nn.Sequential(nn.Sequential(Stages(8, 8, 8), neck), head)
    assert levels_of(model) == {"p2": path.format(0), "p3": path.format(1)}


def test_what_enters_a_head_together_is_proposed_where_no_module_puts_a_pyramid_out():
    match = match_layers(Unbundled(), Unbundled(), PIXELS)
    assert match.layers == {"p2": ("fine",) * 2, "p3": ("coarse",) * 2}
    assert match.student_channels == {"p2": 6, "p3": 12}
    equals_plain_hooks(Unbundled(), match, PIXELS)


def test_what_fuses_several_maps_to_one_is_no_head():
    models = [Unbundled(Pyramid(12)) for _ in range(2)]
    assert list(match_layers(*models, PIXELS).layers) == ["c1", "c2", "c3"]


class RightBehind(Unbundled):
    def forward(self, x):
        c2, c3 = self.stages(x)
        return self.head([self.narrow(c2), self.wide(c3)])

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 12, 1)


def test_what_enters_a_head_may_come_right_behind_the_backbone():
    match = match_layers(RightBehind(), RightBehind(), PIXELS)
    assert match.layers == {"p2": ("narrow",) * 2, "p3": ("wide",) * 2}


FPN_OUTPUTS = {
    "fasterrcnn": {f"p{i}": f"backbone[{key}]" for i, key in enumerate([0, 1, 2, 3, "pool"], 2)},
    "retinanet": {f"p{i}": f"backbone[{key}]" for i, key in enumerate([0, 1, 2, "p6"], 3)},
}


def test_the_pyramids_of_two_families_are_paired_by_stride():
    student, teacher = detector("retinanet"), detector("fasterrcnn")
    match = match_layers(student, teacher, detector_images())
    ours, theirs = FPN_OUTPUTS["retinanet"], FPN_OUTPUTS["fasterrcnn"]
    assert match.layers == {level: (ours[level], theirs[level]) for level in ours}
    assert list(match.others) == ["c1", "c2", "c3", "c4", "c5"]


# --- branches, heads, outputs that are no tensor, tokens ------------------------------------------


class ReducedAttention(nn.Module):
    """A block on tokens with a strided convolution in a branch, as PVT's and SegFormer's."""

    def __init__(self, width, size):
        super().__init__()
        self.size = size
        self.reduce = nn.Conv2d(width, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        features = tokens.transpose(1, 2).unflatten(2, self.size)
        return self.norm(tokens + self.reduce(features).mean((2, 3))[:, None])


class TokenStage(nn.Module):
    def __init__(self, ours, theirs, size):
        super().__init__()
        self.project = nn.Conv2d(ours, theirs, 2, 2)
        self.block = ReducedAttention(theirs, size)

    def forward(self, x):
        x = self.project(x)
        return self.block(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def test_a_branch_inside_a_block_is_no_stage():
    model = nn.Sequential(TokenStage(3, 8, (32, 48)), TokenStage(8, 16, (16, 24)))
    assert match_layers(model, model, PIXELS).layers == {"c1": ("0", "0"), "c2": ("1", "1")}
    wrapped = nn.Sequential(nn.Sequential(model[0].project), model[1])
    assert match_layers(wrapped, wrapped, PIXELS).layers == {"c1": ("0", "0"), "c2": ("1", "1")}


class OfImages(nn.Module):
    """Takes a list of images, as torchvision's detectors, and puts out no map either."""

    def __init__(self):
        super().__init__()
        self.body = convolutions(2, 2)

    def forward(self, images):
        return self.body(torch.stack(images)).mean(1)


def test_a_model_of_a_list_of_images_is_no_block_on_tokens():
    match = match_layers(OfImages(), OfImages(), list(PIXELS))
    assert match.layers == {"c1": ("body.0",) * 2, "c2": ("body.1",) * 2}


def test_a_part_of_a_list_of_images_shrinks_them_as_if_it_took_in_their_batch():
    class Batched(OfImages):
        def forward(self, images):
            return self.body(torch.stack(images))

    assert levels_of(nn.Sequential(Batched()), list(PIXELS)) == {"c1": "0.body.0", "c2": "0.body.1"}


def test_a_part_that_works_on_what_is_no_map_is_passed_over():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Sequential(nn.Linear(4, 8))
            self.conv = convolution(3, 8, 2)

        def forward(self, x):
            prompt = self.prompt(x.new_zeros(4))
            return self.conv(x) + prompt[:, None, None]

    assert levels_of(Prompted()) == {"c1": "conv"}


def test_a_part_of_tokens_and_a_map_is_looked_into():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = convolution(8, 8, 2)

        def forward(self, tokens, features):
            return self.down(features).flatten(2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.both = convolution(3, 8, 2), Both()

        def forward(self, x):
            x = self.first(x)
            return self.both(x.flatten(2), x)

    assert levels_of(Model()) == {"c1": "first", "c2": "both.down"}


class Tokens(nn.Module):
    """A vision transformer; with `maps` it puts out its blocks' tokens as maps, as timm does."""

    def __init__(self, maps, width=8):
        super().__init__()
        self.maps = maps
        self.project = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(2))

    def forward(self, x):
        x = self.project(x)
        tokens, maps = x.flatten(2).transpose(1, 2), []
        tokens = torch.cat((tokens[:, :1], tokens), 1)
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, x.shape[2:]))
        return maps if self.maps else tokens


def test_a_patch_projection_is_marked_in_the_table():
    plain = nn.Sequential(*(nn.Conv2d(width, 8, 4, 4) for width in (3, 8)))
    match = match_layers(plain, Tokens(maps=False), PIXELS)
    assert match.layers == {"c4": ("1", "project")}
    assert [layer.patch_projection for layer in match.pairs["c4"]] == [False, True]
    line = "c4, the teacher's 'project': patch projection: tokens follow, see PatchTokens"
    assert str(match).splitlines()[2] == line
    assert "the student's" not in str(match)


class Projects(nn.Module):
    """Tokens are worked on beside the maps, with a strided convolution in a branch."""

    def __init__(self):
        super().__init__()
        self.project, self.down = PROJECTION, nn.Conv2d(8, 8, 2, 2)
        self.block = ReducedAttention(8, (16, 24))

    def forward(self, x):
        x = self.project(x)
        self.block(x.flatten(2).transpose(1, 2))
        return self.down(x)


def test_a_mark_stays_where_a_deeper_level_has_none():
    match = match_layers(Projects(), Projects(), PIXELS)
    assert list(match.pairs) == ["c2", "c3"]
    notes = [line for line in str(match).splitlines() if "patch projection" in line]
    assert [note.split(":")[0] for note in notes] == [
        "c2, the student's 'project'",
        "c2, the teacher's 'project'",
    ]


def test_maps_of_tokens_are_proposed_in_place_of_the_projection():
    model = Tokens(maps=True)
    match = match_layers(model, model, PIXELS)
    assert match.layers == {"c4": ("[1]", "[1]")}
    assert "PatchTokens" not in str(match)
    equals_plain_hooks(model, match, PIXELS)


class Classifier(nn.Module):
    """A head as timm's and Ultralytics' classifiers have one: a convolution before its pooling."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(32, 4)

    def forward(self, x):
        logits = self.linear(self.pool(self.conv(x)).flatten(1))
        return logits.softmax(1), logits


def test_the_head_of_a_classifier_is_no_backbone():
    model = nn.Sequential(convolution(3, 8, 2), convolution(8, 8, 2), Classifier())
    assert match_layers(model, model, PIXELS).layers == {"c1": ("0", "0"), "c2": ("1", "1")}


class Out(nn.Module):
    """Its module's output in a dictionary."""

    def __init__(self, *modules):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x):
        return {"out": self.body(x)}


class Segmenter(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Sequential(nn.Conv2d(8, 21, 1))

    def forward(self, x):
        features = self.backbone(x)
        return self.classifier(features["out"] if isinstance(features, dict) else features)


BODY = convolution(3, 8, 2), convolution(8, 8, 2)


@pytest.mark.parametrize("backbone", [Out(*BODY), nn.Sequential(*BODY)], ids=["dict", "tensor"])
def test_the_head_of_a_segmenter_is_no_backbone(backbone):
    model = Segmenter(backbone)
    prefix = "backbone.body" if isinstance(backbone, Out) else "backbone"
    assert match_layers(model, model, PIXELS).layers == {
        "c1": (f"{prefix}.0",) * 2,
        "c2": (f"{prefix}.1",) * 2,
    }


class InTuple(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.inside = nn.Sequential(*modules)

    def forward(self, x):
        return (self.inside(x) + 1,)


class OfTuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (InTuple(convolution(width, 8, 2)) for width in (3, 8))

    def forward(self, x):
        return self.second(self.first(x)[0])[0]


def test_an_output_that_is_no_tensor_is_proposed_with_its_selector():
    model = OfTuple()
    match = match_layers(model, model, PIXELS)
    assert match.layers == {"c1": ("first[0]",) * 2, "c2": ("second[0]",) * 2}
    equals_plain_hooks(model, match, PIXELS)


class OddKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = convolution(3, 8, 2)

    def forward(self, x):
        return {"a[0]": self.conv(x) + 1, "": self.conv(x) + 1}


def test_what_no_path_can_spell_is_not_listed():
    model = nn.Sequential(convolution(3, 3, 2), OddKeys())
    assert [layer.path for layer in match_layers(model, model, PIXELS).student] == ["0"]


def test_deeplab():
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    match = match_layers(model, model, PIXELS)
    check(match, RESNET_DILATED, RESNET_DILATED)
    assert list(match.layers) == ["c1", "c2", "c3"]


RESNET_DILATED = {"c2": "backbone.layer1", "c3": "backbone.layer4"}
SMALL = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}


@pytest.mark.model_zoo
def test_models_of_transformers():
    import transformers

    segformer = transformers.SegformerModel(
        transformers.SegformerConfig(num_attention_heads=[1, 1, 2, 2], **SMALL)
    )
    expected = stages("stages.{}", range(4))
    match = match_layers(segformer, segformer, PIXELS)
    check(match, expected, expected)
    assert list(match.layers) == list(expected)
    equals_plain_hooks(segformer, match, PIXELS)
    convnext = transformers.ConvNextV2Model(transformers.ConvNextV2Config(**SMALL))
    expected = stages("encoder.stages.{}", range(4))
    match = match_layers(convnext, convnext, PIXELS)
    check(match, expected, expected)
    equals_plain_hooks(convnext, match, PIXELS)
    loss = nn.Identity()
    assert Distiller(convnext, segformer, loss, match_layers(convnext, segformer, PIXELS).layers)


@pytest.mark.model_zoo
def test_efficientvit():
    import timm

    model = timm.create_model("efficientvit_b0", pretrained=False)
    match = match_layers(model, model, PIXELS)
    expected = stages("stages.{}", range(4))
    check(match, expected, expected)
    assert list(match.layers) == ["c1", *expected]


# --- which steps are stages -----------------------------------------------------------------------


def levels_of(model, image=PIXELS):
    """The level's path in the model itself."""
    return {level: ours for level, (ours, _) in match_layers(model, model, image).layers.items()}


class Listed(nn.Module):
    """Puts out lists of maps of strides 2, 4 and 8, of which a module makes the last alone."""

    def __init__(self, *orders):
        super().__init__()
        self.deep = nn.Conv2d(3, 8, 8, 8)
        self.orders = orders

    def forward(self, x):
        maps = [nn.functional.avg_pool2d(x, stride) for stride in (2, 4)] + [self.deep(x)]
        return [[maps[index] for index in order] for order in self.orders]


ALL_OF_ONE = {"c1": "[{0}][0]", "c2": "[{0}][1]", "c3": "deep"}


@pytest.mark.parametrize(
    ("orders", "which"),
    [
        ([(0, 1, 2)], 0),
        ([(1, 0, 2)], None),  # not in the order of strides
        ([(2, 1, 0)], None),
        ([(0, 1)], None),  # not to the deepest
        ([(1, 0, 2), (0, 1), (0, 1, 2)], 2),
    ],
)
def test_a_list_of_the_backbones_maps_has_the_stages_that_no_module_puts_out(orders, which):
    expected = {"c3": "deep"} if which is None else ALL_OF_ONE
    assert levels_of(Listed(*orders)) == {k: v.format(which) for k, v in expected.items()}


def test_a_list_of_a_module_that_runs_twice_or_takes_two_maps_has_no_stages():
    class Twice(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.listed, self.inputs = Lists(), inputs

        def forward(self, x):
            for _ in range(3 - self.inputs):
                maps = self.listed(*[x] * self.inputs)
            return maps[-1]

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.ModuleList([nn.Conv2d(3, 8, 4, 4)])

        def forward(self, x, other=None):
            return [nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(x, 4)]

    for inputs in (1, 2):
        stem = nn.Sequential(nn.Conv2d(3, 3, 4, 4))
        model = nn.ModuleDict({"stem": stem, "lists": Twice(inputs)})
        model.forward = lambda x, model=model: (model["stem"](x), model["lists"](x))
        assert "[0]" not in str(match_layers(model, model, PIXELS))


class GoesOn(CallsItsStages):
    def __init__(self):
        super().__init__()
        self.after = convolution(3, 3, 2)

    def forward(self, x):
        return self.after(super().forward(x))


def test_what_comes_behind_a_neck_is_no_stage():
    assert levels_of(GoesOn()) == {"c1": "c1", "c2": "c2"}


class Squeezed(nn.Module):
    """Its channels are weighted by their means, as in squeeze-and-excitation."""

    def __init__(self, ours, theirs):
        super().__init__()
        self.conv, self.pool = convolution(ours, theirs, 2), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.conv(x)
        return x * self.pool(x)


def test_pooling_inside_a_block_ends_no_backbone():
    model = nn.Sequential(Squeezed(3, 8), Squeezed(8, 8))
    assert levels_of(model) == {"c1": "0", "c2": "1"}


@pytest.mark.parametrize("nested", [False, True])
def test_the_backbone_ends_where_the_stride_falls(nested):
    start, end = [convolution(3, 8, 2), nn.Upsample(scale_factor=2)], [convolution(8, 8, 2)]
    model = nn.Sequential(*([nn.Sequential(*start)] if nested else start), *end, nn.Flatten())
    assert levels_of(model) == {"c1": "0.0" if nested else "0"}


def test_the_backbone_ends_where_two_maps_come_out():
    class TakesTheLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.extra = Stages(8, 8, 8), convolution(8, 8, 2)

        def forward(self, x):
            return self.extra(self.backbone(x)[-1])

    assert list(levels_of(TakesTheLast())) == ["c1", "c2", "c3"]


def test_tokens_of_a_map_that_is_not_smaller_than_the_image_come_of_no_head():
    model = nn.Sequential(
        convolution(3, 8),
        nn.Sequential(convolution(8, 8), nn.Flatten(2)),
        nn.Unflatten(2, PIXELS.shape[2:]),
        convolution(8, 8, 2),
    )
    assert levels_of(model) == {"c1": "3"}


def test_a_model_that_enlarges_its_image_first_has_its_stages():
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 8, 4, 4))
    assert levels_of(model) == {"c1": "1"}


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((4, 4), {"c1": "0", "c2": "1"}),  # as a stride of 2 shrinks it
        ((6, 6), {"c1": "0"}),
        ((6, 4), {"c1": "0"}),
        ((4, 6), {"c1": "0"}),
    ],
)
def test_pooling_of_more_than_two_positions_a_side_into_one_ends_the_backbone(size, levels):
    model = nn.Sequential(convolution(3, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert levels_of(model, torch.zeros(1, 3, *size)) == levels


@pytest.mark.parametrize(("held", "stage"), [(2, "1"), (3, "0")])
def test_what_holds_most_of_the_backbone_is_all_of_it(held, stage):
    """Behind it, at its stride, is a head; behind the first half is the second."""
    first = nn.Sequential(convolution(3, 8, 2), *(nn.Tanh() for _ in range(held - 1)))
    model = nn.Sequential(first, nn.Sequential(convolution(8, 8), nn.Tanh()))
    assert levels_of(model) == {"c1": stage}


def test_the_head_of_a_shallow_classifier_is_no_backbone():
    model = nn.Sequential(convolution(3, 8, 2), Classifier())
    assert levels_of(model) == {"c1": "0"}


class ToTokens(nn.Module):
    def __init__(self, prefix=0):
        super().__init__()
        self.prefix = prefix

    def forward(self, maps):
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat((tokens[:, : self.prefix], tokens), 1)


class ToMaps(nn.Module):
    def forward(self, tokens):
        return tokens.transpose(1, 2).unflatten(2, (16, 24))


def block_on_tokens(ours=8, theirs=8):
    return nn.Sequential(nn.Linear(ours, theirs))


PROJECTION = nn.Conv2d(3, 8, 4, 4)


@pytest.mark.parametrize(
    ("parts", "is_projection"),
    [
        ([PROJECTION, ToTokens(), block_on_tokens()], True),
        ([PROJECTION, ToTokens(prefix=1), block_on_tokens()], True),
        ([PROJECTION, nn.BatchNorm2d(8), nn.ReLU(), ToTokens(), block_on_tokens()], False),
        ([PROJECTION, ToTokens(), nn.LayerNorm(8)], False),
        ([PROJECTION, ToTokens(), block_on_tokens(8, 9)], False),
        ([PROJECTION, ToTokens(), nn.Linear(8, 9), block_on_tokens(9, 9)], False),
        ([PROJECTION, nn.AvgPool2d(2), ToTokens(), block_on_tokens()], False),
    ],
    ids=["tokens", "a prefix", "a last step", "a norm", "narrow", "wider", "fewer"],
)
def test_a_patch_projection_has_blocks_on_its_positions_behind_it(parts, is_projection):
    model = nn.Sequential(*parts).eval()
    stage = match_layers(model, model, PIXELS).pairs["c2"][0]
    assert stage.patch_projection is is_projection


@pytest.mark.parametrize(("layers", "is_projection"), [(3, True), (4, False)])
def test_a_patch_projection_is_a_layer_normalised_and_activated(layers, is_projection):
    parts = [PROJECTION, nn.BatchNorm2d(8), nn.ReLU(), nn.Identity()][:layers]
    model = nn.Sequential(nn.Sequential(*parts), ToTokens(), block_on_tokens()).eval()
    stage = match_layers(model, model, PIXELS).pairs["c2"][0]
    assert (stage.path, stage.patch_projection) == ("0", is_projection)


def test_maps_that_are_made_of_tokens_are_a_stage_and_no_projection():
    model = nn.Sequential(PROJECTION, ToTokens(), block_on_tokens(), ToMaps(), nn.Identity())
    stage = match_layers(model, model, PIXELS).pairs["c2"][0]
    assert (stage.path, stage.patch_projection) == ("4", False)


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
    with pytest.raises(TypeError, match=r"`levels` must be strings, got int\."):
        match.select(2)
    for levels in ((), ("c2", "c2")):
        with pytest.raises(ValueError, match="at least one, each once"):
            match.select(*levels)
