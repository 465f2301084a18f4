"""Strides, maps of the image, and the calls of one forward."""

import pytest
import torch
from torch import nn

from featkd.taps.trace import Call, FeatureMap, first_image, read_maps, stride_of, trace


@pytest.mark.parametrize(
    ("shape", "pixels", "stride"),
    [
        ((1, 8, 13, 5), (1, 3, 100, 40), 8.0),  # a strided convolution rounds up
        ((1, 8, 12, 5), (1, 3, 100, 40), 8.0),
        ((1, 8, 11, 5), (1, 3, 96, 40), 8.73),
        ((1, 8, 2, 2), (1, 3, 40, 40), 32.0),  # 40, 20, 10, 5, 3, 2
        ((1, 8, 3, 3), (1, 3, 40, 40), 16.0),
        ((1, 8, 2, 3), (1, 3, 40, 56), 16.0),  # one that rounds down, by the width
        ((1, 8, 34, 5), (1, 3, 100, 40), 2.94),
        ((1, 8, 16, 5), (1, 3, 224, 40), 14.0),
        ((1, 8, 1, 5), (1, 3, 1, 40), 1.0),
        ((1, 8, 128, 5), (1, 3, 64, 40), 0.5),
    ],
)
def test_the_stride_is_a_power_of_2_that_fits_both_ways_or_told_by_the_heights(
    shape, pixels, stride
):
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


def test_the_first_large_map_is_the_image():
    call = Call("", 0, inner=[Call("a", 1), Call("b", 2)])
    assert first_image(call) == (0, 0, 0, 0)
    shapes = [(1, 1, 2, 3), (1, 3, 4, 6), (1, 1, 4, 6)], [(1, 8, 8, 12)]
    for inner, found in zip(call.inner, shapes, strict=True):
        inner.taken_in = [FeatureMap(shape, (), 1) for shape in found]
    assert first_image(call) == (1, 3, 4, 6)
