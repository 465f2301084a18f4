"""Captures that are converted at `pop`, and tokens, whose map follows the image."""

import copy
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import featkd
from featkd import FeatureTap, PatchTokens
from tests.helpers.models import LEVELS, Net, images, plain_hooks, raises
from tests.helpers.tapped import Checkpointed, captured, captures_what_plain_hooks_see, doubled
from tests.helpers.tensors import close, normal

# --- other layouts --------------------------------------------------------------------------------


def test_what_is_captured_is_converted_at_pop_and_the_model_sees_nothing_of_it():
    model = Net().eval()
    expected = plain_hooks(model, LEVELS.values(), lambda: model(images()))
    output = model(images())
    seen = []

    def convert(feature):
        seen.append(feature)
        return feature.permute(0, 2, 3, 1)

    with FeatureTap(model, LEVELS, convert={"c2": convert}) as tap:
        close(model(images()), output, 0.0)
        assert not seen
        features = tap.pop()
    close(features["c1"], expected["backbone.c1"], 0.0)
    close(features["c2"], expected["backbone.c2"].permute(0, 2, 3, 1), 0.0)
    assert features["c2"].requires_grad


def test_every_call_of_a_shared_head_is_converted():
    head = nn.Identity()
    model = nn.ModuleDict({"head": head})
    with FeatureTap(model, {"p": "head"}, calls={"p": 3}, convert={"p": doubled}) as tap:
        for level in range(3):
            head(images() + level)
        for level, feature in enumerate(tap.pop().values()):
            close(feature, 2 * (images() + level), 0.0)


def test_no_conversion_is_an_empty_mapping_too():
    model = Net()
    tap = FeatureTap(model, LEVELS, convert={})
    captures_what_plain_hooks_see(tap, model, lambda: model(images()))


def test_a_missing_gradient_is_found_behind_a_conversion():
    model = Checkpointed(use_reentrant=True)
    convert = {"c1": lambda feature: feature.requires_grad_()}
    with FeatureTap(model, LEVELS, convert=convert) as tap:
        model(images())
        raises(RuntimeError, tap.pop, "'backbone.c1'", "use_reentrant=False")


def test_a_conversion_that_fails_leaves_the_tap_ready():
    model = Net()
    convert = {"c1": partial(featkd.from_tokens, size=(2, 2))}
    with FeatureTap(model, LEVELS, convert=convert) as tap:
        model(images())
        raises(ValueError, tap.pop, "`tokens`")
        raises(RuntimeError, tap.pop, "got 0")


# --- tokens, whose map follows the image ----------------------------------------------------------


class Patches(nn.Module):
    """The tokens of 4 x 4 patches behind two others."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 4, 4)
        self.double()

    def forward(self, image):
        tokens = self.conv(image).flatten(2).mT
        return torch.cat([tokens[:, :2] * 0, tokens], dim=1)


class Vit(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.patches = Patches(channels)
        self.blocks = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, pixel_values=None, *, mask=None):
        return self.blocks(self.features(pixel_values))

    def features(self, pixel_values):
        return self.patches(pixel_values)


class Resized(nn.Module):
    """Its part sees another image than it does."""

    def __init__(self, size):
        super().__init__()
        self.vit = Vit()
        self.size = size

    def forward(self, image):
        return self.vit(nn.functional.interpolate(image, self.size))


class Batched(nn.Module):
    """As a detector that takes a list of images."""

    def __init__(self):
        super().__init__()
        self.vit = Vit()

    def forward(self, images):
        return self.vit(torch.stack(images))


BY_PATCH = PatchTokens(4, prefix=2)
SIZES = [(8, 24), (24, 8), (16, 12), (12, 16), (18, 27)]


def patch_map(model, image):
    return (model if isinstance(model, Vit) else model.vit).patches.conv(image)


@pytest.mark.parametrize("path", ["blocks.1", "blocks", "patches", "", "blocks:input"])
@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_the_map_of_tokens_follows_the_image(path, by_name):
    model = Vit()
    with FeatureTap(model, {"c": path}, convert={"c": BY_PATCH}) as tap:
        for size in SIZES:
            image = normal(2, 3, *size)
            if by_name:
                model(mask=torch.ones(2, 1, *size, dtype=torch.bool), pixel_values=image)
            else:
                model(image)
            close(tap.pop()["c"], patch_map(model, image), 0.0)


def test_a_list_of_images_is_one_where_the_model_batches_it():
    model = Batched()
    with FeatureTap(model, {"c": "vit.blocks.0"}, convert={"c": BY_PATCH}) as tap:
        for size in SIZES:
            image = normal(2, 3, *size)
            model(list(image))
            close(tap.pop()["c"], patch_map(model, image), 0.0)


def test_an_image_that_is_resized_inside_counts_as_it_enters_the_part():
    """The token count alone would not tell: 4 x 16 patches come in and 8 x 8 are looked at."""
    model = Resized((32, 32))
    image = normal(2, 3, 16, 64)
    with FeatureTap(model, {"c": "vit.blocks"}, convert={"c": BY_PATCH}) as tap:
        model(image)
        expected = patch_map(model, nn.functional.interpolate(image, (32, 32)))
        close(tap.pop()["c"], expected, 0.0)


def test_feature_maps_inside_are_no_images():
    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 2, 2).double()
            self.vit = Vit(channels=8)

        def forward(self, image):
            return self.vit(self.stem(image))

    model = Hybrid()
    convert = {"c": PatchTokens(8, prefix=2)}
    with FeatureTap(model, {"c": "vit.blocks"}, convert=convert) as tap:
        model(images())
        close(tap.pop()["c"], patch_map(model, model.stem(images())), 0.0)


def test_each_alias_has_the_image_of_its_own_part():
    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = Vit(), Vit()

        def forward(self, low, high):
            return self.low(low), self.high(high)

    model = Streams()
    layers = {"low": "low.blocks", "high": "high.blocks"}
    with FeatureTap(model, layers, convert=dict.fromkeys(layers, BY_PATCH)) as tap:
        low, high = normal(2, 3, 8, 24), normal(2, 3, 24, 8)
        model(low, high)
        features = tap.pop()
    close(features["low"], patch_map(model.low, low), 0.0)
    close(features["high"], patch_map(model.high, high), 0.0)


def test_each_call_has_the_image_of_its_own():
    model = Vit()
    batches = [normal(2, 3, *size) for size in SIZES]
    calls = {"c": len(SIZES)}
    with FeatureTap(model, {"c": "blocks"}, calls=calls, convert={"c": BY_PATCH}) as tap:
        for image in batches:
            model(image)
        for image, feature in zip(batches, tap.pop().values(), strict=True):
            close(feature, patch_map(model, image), 0.0)


@pytest.mark.parametrize("with_image_before", [True, False])
def test_tokens_without_an_image_are_an_error(with_image_before):
    """An image of another forward is none."""
    model = Vit()
    with FeatureTap(model, {"c": "blocks"}, convert={"c": BY_PATCH}) as tap:
        if with_image_before:
            model(images())
            tap.pop()
        model.blocks(model.features(images()))
        raises(RuntimeError, tap.pop, "`convert['c']`", "methods", "from_tokens")


def test_tokens_of_another_patch_are_an_error_with_the_image():
    model = Vit()
    with FeatureTap(model, {"c": "blocks"}, convert={"c": PatchTokens(8, prefix=2)}) as tap:
        model(images())
        raises(ValueError, tap.pop, "16 x 24 in patches of 8 x 8", "2 + 2 x 3 + 0", "(2, 26, 6)")


def test_the_image_is_not_kept():
    model = Vit()
    with FeatureTap(model, {"c": "blocks"}, convert={"c": BY_PATCH}) as tap, torch.no_grad():
        image = images()
        alive = weakref.ref(image)
        model(image)
        del image
        assert alive() is None
        assert tap.pop()["c"].shape == (2, 6, 4, 6)


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deep", "pickle"],
)
def test_a_copy_of_a_tap_of_tokens(make_copy):
    model = Vit()
    tap = FeatureTap(model, {"c": "blocks"}, convert={"c": BY_PATCH})
    model, tap = make_copy((model, tap))
    close(captured(tap, lambda: model(images()))["c"], patch_map(model, images()), 0.0)
