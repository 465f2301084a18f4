"""Channels-last maps and tokens as feature maps: the elements, the gradients and the errors."""

import copy
import pickle

import pytest
import torch

import featkd
from featkd import PatchTokens, from_channels_last, from_tokens
from featkd.taps.layouts import converted, converts_by_side
from tests.helpers.models import raises
from tests.helpers.tensors import close, normal

MAPS = normal(2, 5, 3, 4)
CHANNELS_LAST = MAPS.permute(0, 2, 3, 1).contiguous()
TOKENS = CHANNELS_LAST.reshape(2, 12, 5)
PATCHES = PatchTokens(16)


def test_channels_last_maps_are_read_element_by_element():
    close(from_channels_last(CHANNELS_LAST), MAPS, 0.0)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("suffix", [0, 1, 5])
def test_tokens_are_read_row_by_row_between_prefix_and_suffix(prefix, suffix):
    around = normal(2, prefix, 5, seed=1), normal(2, suffix, 5, seed=2)
    tokens = torch.cat([around[0], TOKENS, around[1]], dim=1)
    close(from_tokens(tokens, (3, 4), prefix=prefix, suffix=suffix), MAPS, 0.0)
    close(from_tokens(tokens, [3, 4], prefix=prefix, suffix=suffix), MAPS, 0.0)


CALLS = {
    "channels last": (from_channels_last, CHANNELS_LAST),
    "tokens": (lambda tokens: from_tokens(tokens, (3, 4)), TOKENS),
    "tokens behind a prefix": (lambda tokens: from_tokens(tokens, (1, 11), prefix=1), TOKENS),
    "tokens of an image": (lambda tokens: PATCHES(tokens, (48, 64)), TOKENS),
}
each_call = pytest.mark.parametrize(("call", "features"), CALLS.values(), ids=CALLS)


@each_call
def test_gradients_go_back_to_where_they_came_from(call, features):
    assert torch.autograd.gradcheck(call, features.clone().requires_grad_())


@each_call
def test_nothing_is_copied_and_no_dtype_changed(call, features):
    assert call(features).data_ptr() >= features.data_ptr()
    assert call(features).untyped_storage().data_ptr() == features.untyped_storage().data_ptr()
    assert call(features.half()).dtype == torch.float16


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 5), (2, 3, 4, 1)], ids=str)
def test_maps_of_one_row_column_or_channel(shape):
    features = normal(*shape)
    expected = features.permute(0, 3, 1, 2)
    assert torch.equal(from_channels_last(features), expected)
    assert torch.equal(from_tokens(features.flatten(1, 2), shape[1:3]), expected)


# --- tokens of an image's patches -----------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (2, 6), (6, 2), (1, 12), (12, 1)], ids=str)
@pytest.mark.parametrize("patch", [14, (14, 14), [16, 8]], ids=str)
def test_the_map_of_an_image_has_its_height_and_width(size, patch):
    """The same count of tokens for all of them."""
    height, width = (patch, patch) if isinstance(patch, int) else patch
    image = size[0] * height, size[1] * width
    expected = CHANNELS_LAST.reshape(2, *size, 5).permute(0, 3, 1, 2)
    close(PatchTokens(patch)(TOKENS, image), expected, 0.0)


def test_what_stands_before_and_behind_the_patches_is_left_out():
    tokens = torch.cat([normal(2, 5, 5, seed=1), TOKENS, normal(2, 3, 5, seed=2)], dim=1)
    close(PatchTokens(14, prefix=5, suffix=3)(tokens, (42, 56)), MAPS, 0.0)


# The map of 3 x 4 patches of 14 x 14.
@pytest.mark.parametrize("image", [(42, 56), (43, 69), (55, 57)], ids=str)
def test_an_image_that_the_model_cuts(image):
    close(PatchTokens(14)(TOKENS, image), MAPS, 0.0)


@pytest.mark.parametrize("image", [(29, 43), (42, 55), (30, 56)], ids=str)
def test_an_image_that_the_model_pads(image):
    close(PatchTokens(14)(TOKENS, image), MAPS, 0.0)


def test_an_image_smaller_than_a_patch_has_one_where_it_is_padded():
    close(PatchTokens(14)(TOKENS[:, :1], (9, 9)), TOKENS[:, :1].mT.unsqueeze(3), 0.0)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_equal(make_copy):
    ours = PatchTokens((14, 7), prefix=5, suffix=1)
    assert make_copy(ours) == ours
    assert hash(make_copy(ours)) == hash(ours)
    assert repr(ours) == "PatchTokens(patch_size=(14, 7), prefix=5, suffix=1)"


class Teacher(torch.nn.Module):
    """The tokens of patches of 4 x 4, behind another one."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 5, 4, 4).double()
        self.blocks = torch.nn.Sequential(torch.nn.Tanh())

    def forward(self, pixels):
        tokens = self.patches(pixels).flatten(2).mT
        return self.blocks(torch.cat([tokens[:, :1], tokens], dim=1))


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"shared_input": ("", "")},
        {"teacher_forward": lambda teacher, image: teacher(pixels=image)},
        {"early_stop": True},
    ],
    ids=["as the student", "shared input", "teacher_forward", "early stop"],
)
def test_a_distiller_maps_the_teachers_tokens_by_the_image(call):
    class Seen(torch.nn.Module):
        def forward(self, student, teacher):
            self.teacher = teacher["c"]
            return {"seen": student["c"].mean()}

    student, teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8, 8)).double(), Teacher()
    distiller = featkd.Distiller(
        student,
        teacher,
        Seen(),
        {"c": ("0", "blocks.0")},
        convert={"c": (None, PatchTokens(4, prefix=1))},
        **call,
    )
    for size in [(8, 24), (24, 8), (16, 16)]:
        image = normal(2, 3, *size)
        distiller(image)
        close(distiller.loss.teacher, teacher.patches(image).tanh(), 0.0)


SIDES = {
    "one function": (from_channels_last, [from_channels_last, from_channels_last]),
    "a pair": ((from_channels_last, abs), [from_channels_last, abs]),
    "the student's": ((from_channels_last, None), [from_channels_last, None]),
    "the teacher's": ([None, from_channels_last], [None, from_channels_last]),
    "neither's": ((None, None), [None, None]),
}


@pytest.mark.parametrize(("functions", "expected"), SIDES.values(), ids=SIDES)
def test_each_side_gets_its_function_at_each_level(functions, expected):
    sides = converts_by_side({"c1": functions, "c2": abs}, ["c1", "c2", "c3"])
    assert [side.get("c1") for side in sides] == expected
    assert [side["c2"] for side in sides] == [abs, abs]
    assert all(function is not None for side in sides for function in side.values())


def test_no_conversion_is_none_for_both_sides():
    assert converts_by_side(None, ["c1"]) == converts_by_side({}, []) == ({}, {})


@each_call
def test_an_empty_batch(call, features):
    assert call(features[:0]).shape[0] == 0


@each_call
def test_compiled(call, features, fresh_compiler):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(features), call(features), 0.0)


MISUSE = {
    "maps of another kind": (TypeError, lambda: from_channels_last([1.0]), "`features`"),
    "no rows": (ValueError, lambda: from_channels_last(torch.ones(2, 0, 4, 5)), "(B, H, W, C)"),
    "no channels": (ValueError, lambda: from_tokens(torch.ones(2, 12, 0), (3, 4)), "(2, 12, 0)"),
    "integers": (TypeError, lambda: from_channels_last(CHANNELS_LAST.long()), "`features`"),
    "maps of another rank": (ValueError, lambda: from_channels_last(TOKENS), "(2, 12, 5)"),
    "tokens of another kind": (TypeError, lambda: from_tokens(None, (3, 4)), "`tokens`"),
    "tokens of another rank": (
        ValueError,
        lambda: from_tokens(CHANNELS_LAST, (3, 4)),
        "(2, 3, 4, 5)",
    ),
    "another count": (
        ValueError,
        lambda: from_tokens(TOKENS, (3, 5), prefix=1),
        "(B, 16, C), 1 + 3 x 5 + 0 tokens",
    ),
    "the count that was found": (ValueError, lambda: from_tokens(TOKENS, (3, 5)), "(2, 12, 5)"),
    "a size that is no pair": (TypeError, lambda: from_tokens(TOKENS, 12), "`size`"),
    "a height of another kind": (TypeError, lambda: from_tokens(TOKENS, (3.0, 4)), "`size[0]`"),
    "no width": (ValueError, lambda: from_tokens(TOKENS, (12, 0)), "`size[1]`"),
    "a negative prefix": (ValueError, lambda: from_tokens(TOKENS, (3, 4), prefix=-1), "`prefix`"),
    "patches of another kind": (
        TypeError,
        lambda: PatchTokens(14.0),
        "`patch_size` must be an int",
    ),
    "patches of no height": (ValueError, lambda: PatchTokens((0, 14)), "`patch_size[0]`"),
    "patches of three sides": (TypeError, lambda: PatchTokens((14, 14, 3)), "(14, 14, 3)"),
    "fewer than no registers": (ValueError, lambda: PatchTokens(14, prefix=-1), "`prefix`"),
    "less than nothing behind": (ValueError, lambda: PatchTokens(14, suffix=-1), "`suffix`"),
    "an image without width": (
        ValueError,
        lambda: PatchTokens(14)(TOKENS, (42, 0)),
        "image_size[1]",
    ),
    "patches of integers": (
        TypeError,
        lambda: PatchTokens(14)(TOKENS.long(), (42, 56)),
        "`tokens`",
    ),
    "no token for an image that is cut to nothing": (
        ValueError,
        lambda: PatchTokens(14)(TOKENS[:, :0], (9, 9)),
        "image of 9 x 9 in patches of 14 x 14, got (2, 0, 5)",
    ),
    "maps in place of patches": (
        ValueError,
        lambda: PatchTokens(14)(CHANNELS_LAST, (42, 56)),
        "(2, 3, 4, 5)",
    ),
    "patches of another image": (
        ValueError,
        lambda: PatchTokens(14, prefix=5)(TOKENS, (42, 70)),
        "`tokens` must have the shape (B, 5 + 3 x 5 + 0, C) (`prefix`, positions, `suffix`) for an "
        "image of 42 x 70 in patches of 14 x 14, got (2, 12, 5).",
    ),
    "cut or padded": (
        ValueError,
        lambda: PatchTokens((14, 7), suffix=1)(TOKENS, (43, 70)),
        "(B, 0 + 3 x 10 + 1 or 0 + 4 x 10 + 1, C)",
    ),
    "functions of no level": (
        TypeError,
        lambda: converts_by_side([abs], ["c1"]),
        "`convert` must be a mapping from level to function, got list.",
    ),
    "a function of an unknown level": (
        ValueError,
        lambda: converts_by_side({"c1": abs, "c2": abs}, ["c1"]),
        "`convert` must name levels of ['c1'], got 'c2'.",
    ),
    "a function for neither side": (
        TypeError,
        lambda: converts_by_side({"c1": None}, ["c1"]),
        "`convert['c1']` must be a function or a (student's, teacher's) pair",
    ),
    "a string of two for the two sides": (
        TypeError,
        lambda: converts_by_side({"c1": "ab"}, ["c1"]),
        "got 'ab'.",
    ),
    "a third side": (TypeError, lambda: converts_by_side({"c1": [abs] * 3}, ["c1"]), "convert"),
    "no function for a side": (
        TypeError,
        lambda: converts_by_side({"c1": (abs, "NHWC")}, ["c1"]),
        "`convert['c1']` must be callable or None, got str.",
    ),
    "a prefix of another kind": (
        TypeError,
        lambda: from_tokens(TOKENS, (3, 4), prefix=None),
        "`prefix`",
    ),
}


@pytest.mark.parametrize(("error", "call", "mention"), MISUSE.values(), ids=MISUSE)
def test_misuse(error, call, mention):
    raises(error, call, mention)


@pytest.mark.parametrize(
    ("features", "function"), [(CHANNELS_LAST, "from_channels_last"), (TOKENS, "from_tokens")]
)
def test_a_loss_names_the_function_that_its_features_lack(features, function):
    loss = featkd.AttentionTransferLoss(5, 5)
    raises(ValueError, lambda: loss(features, MAPS), f"see `featkd.{function}` and the argument")


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 12, 4), (2, 4, 5, 3), (2, 5)], ids=str)
def test_a_loss_names_no_function_where_the_channels_are_not_last(shape):
    with pytest.raises(ValueError, match="`student` must have the shape") as caught:
        featkd.AttentionTransferLoss(5, 5)(torch.ones(shape), MAPS)
    assert "featkd." not in str(caught.value)


def test_they_are_public():
    assert {"PatchTokens", "from_channels_last", "from_tokens"} <= set(featkd.__all__)


def test_tokens_of_no_image_say_what_to_call():
    text = (
        "`convert['c4']` must know the image's size, got no image (B, C, H, W) in a call of the "
        "model or of a part around the tapped module: call these and not their methods, or take "
        "`featkd.from_tokens` with a size."
    )
    raises(RuntimeError, lambda: converted(PATCHES, TOKENS, None, "c4"), text)
