"""A backbone's stages: which steps they are, and where the backbone ends."""

import pytest
import torch
import torchvision
from torch import nn

from featkd import Distiller, match_layers
from tests.helpers.staged import (
    PIXELS,
    CallsItsStages,
    Stages,
    check,
    convolution,
    convolutions,
    equals_plain_hooks,
    levels_of,
    stages,
)

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
        ((4, 4), {"c1": "0"}),
        ((6, 6), {"c1": "0"}),
        ((6, 4), {"c1": "0"}),
        ((4, 6), {"c1": "0"}),
    ],
)
def test_pooling_into_one_position_ends_the_backbone(size, levels):
    model = nn.Sequential(convolution(3, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert levels_of(model, torch.zeros(1, 3, *size)) == levels


@pytest.mark.parametrize(("size", "levels"), [(4, {"c1": "0", "c2": "1"}), (6, {"c1": "0"})])
def test_a_layer_that_is_trained_may_leave_one_position_of_two_a_side_but_not_of_more(size, levels):
    last = nn.Conv2d(8, 8, size // 2)
    model = nn.Sequential(convolution(3, 8, 2), last, nn.Flatten())
    assert levels_of(model, torch.zeros(1, 3, size, size)) == levels


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
