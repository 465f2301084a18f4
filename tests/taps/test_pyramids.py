"""What an FPN puts out, or what enters a head together."""

import pytest
import torch
from torch import nn

from featkd import match_layers
from tests.helpers.models import detector, detector_images
from tests.helpers.staged import (
    PIXELS,
    Pyramid,
    Stages,
    convolution,
    equals_plain_hooks,
    levels_of,
)


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


def test_a_pyramid_at_the_end_of_a_model_is_what_it_puts_out():
    """As a torchvision detector's backbone with its FPN is, by itself or inside another."""
    bare = nn.Sequential(Stages(8, 8, 8), FPN((8, 8), 5))
    match = match_layers(bare, Detector(8), PIXELS)
    assert match.layers == {"p2": ("[0]", "neck[0]"), "p3": ("[1]", "neck[1]")}
    equals_plain_hooks(bare, match_layers(bare, bare, PIXELS), PIXELS)


class Supervised(Stages):
    """Puts out logits at every stride."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self.logits = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in widths)

    def forward(self, x):
        found = []
        for stage, logits in zip(self.stages, self.logits, strict=True):
            found.append(logits(x := stage(x)))
        return found


@pytest.mark.parametrize("model", [Supervised(8, 8, 8), Stages(8, 8, 8), Detector(8)])
def test_logits_and_stages_at_the_end_of_a_model_are_no_pyramid_of_its_end(model):
    found = [layer.path for layer in match_layers(model, model, PIXELS).student if layer.pyramid]
    assert not any(path.startswith("[") for path in found)


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
