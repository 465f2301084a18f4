"""Every misuse raises before any work is done; the text names argument, rule and finding."""

import re
from functools import partial

import pytest
import torch

import featkd
from featkd import functional as f

TEXT = re.compile(r"`\w+(\['\w+'\])?` must .+, got .+", re.DOTALL)

MAP = torch.ones(2, 3, 4, 5)
OTHER_SIZE = torch.ones(2, 3, 4, 6)
OTHER_CHANNELS = torch.ones(2, 7, 4, 5)
OTHER_BATCH = torch.ones(1, 3, 4, 5)
FLAT = torch.ones(2, 3)
VOLUME = torch.ones(2, 3, 4, 5, 6)
ONE = torch.ones(2, 1, 4, 5)
META = torch.ones(2, 3, 4, 5, device="meta")

# Calls with one argument left open: feature maps.
ONE_MAP = {
    "spatial_attention": f.spatial_attention,
    "channel_attention": f.channel_attention,
    "SpatialAttention": featkd.SpatialAttention(),
    "ChannelAttention": featkd.ChannelAttention(),
    "NonLocalRelation": featkd.NonLocalRelation(3, kind="dot_product"),
}
# Calls of (student, teacher) feature maps with 3 channels each.
TOTAL = featkd.FeatureDistillationLoss(3, 3, hyperparameters=featkd.TWO_STAGE)
TWO_MAPS = {
    "attention_transfer_loss": f.attention_transfer_loss,
    "attention_masked_loss": f.attention_masked_loss,
    "AttentionTransferLoss": featkd.AttentionTransferLoss(3, 3),
    "AttentionMaskedLoss": featkd.AttentionMaskedLoss(3, 3, temperature=0.5),
    "NonLocalLoss": featkd.NonLocalLoss(3, 3, kind="dot_product"),
    "FeatureDistillationLoss": TOTAL,
}
# Calls of two tensors of one shape, of any rank.
TWO_ALIKE = TWO_MAPS | {
    "non_local_loss": f.non_local_loss,
    "attention_mask": partial(f.attention_mask, temperature=0.5),
    "AttentionMask": featkd.AttentionMask(0.5),
}
RELATIONS = {
    "embedded_gaussian_relation": f.embedded_gaussian_relation,
    "dot_product_relation": f.dot_product_relation,
}

NOT_TENSORS = {"None": None, "list": [[1.0]], "string": "features", "number": 1.0}
WRONG_DTYPES = [torch.int64, torch.bool, torch.complex64]


def each(calls):
    return pytest.mark.parametrize("call", calls.values(), ids=calls)


def raises(error, call, *mentions):
    """`call` raises exactly `error`, worded by the rule, and mentions the given values."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    assert TEXT.search(str(caught.value)), str(caught.value)
    for mention in mentions:
        assert str(mention) in str(caught.value)


def shapes(*tensors):
    return [tuple(tensor.shape) for tensor in tensors]


# --- tensors --------------------------------------------------------------------------------------


@each(ONE_MAP)
@pytest.mark.parametrize("value", NOT_TENSORS.values(), ids=NOT_TENSORS)
def test_no_tensor(call, value):
    raises(TypeError, lambda: call(value), "`features`", type(value).__name__)


@each(TWO_ALIKE)
@pytest.mark.parametrize("value", NOT_TENSORS.values(), ids=NOT_TENSORS)
def test_no_tensor_beside_a_tensor(call, value):
    raises(TypeError, lambda: call(value, MAP), type(value).__name__)
    raises(TypeError, lambda: call(MAP, value), type(value).__name__)


@each(ONE_MAP)
@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
def test_wrong_dtype(call, dtype):
    raises(TypeError, lambda: call(MAP.to(dtype)), "`features`", dtype)


@each(TWO_ALIKE)
@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
def test_wrong_dtype_beside_a_right_one(call, dtype):
    raises(TypeError, lambda: call(MAP.to(dtype), MAP), dtype)
    raises(TypeError, lambda: call(MAP, MAP.to(dtype)), dtype)


@each(ONE_MAP)
@pytest.mark.parametrize("value", [FLAT, MAP[0], VOLUME], ids=lambda value: f"rank{value.ndim}")
def test_wrong_rank(call, value):
    raises(ValueError, lambda: call(value), "`features`", *shapes(value))


@each(TWO_MAPS)
@pytest.mark.parametrize("value", [FLAT, MAP[0], VOLUME], ids=lambda value: f"rank{value.ndim}")
def test_wrong_rank_beside_a_right_one(call, value):
    raises(ValueError, lambda: call(value, MAP), *shapes(value))
    raises(ValueError, lambda: call(MAP, value), *shapes(value))
    raises(ValueError, lambda: call(value, value), *shapes(value))


@each(ONE_MAP)
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_no_element_in_an_image(call, dimension):
    empty = MAP.narrow(dimension, 0, 0)
    raises(ValueError, lambda: call(empty), "`features`", *shapes(empty))


@each(TWO_ALIKE)
@pytest.mark.parametrize("other", [OTHER_SIZE, OTHER_BATCH], ids=["size", "batch"])
def test_both_shapes_are_named_where_they_differ(call, other):
    raises(ValueError, lambda: call(MAP, other), *shapes(MAP, other))
    raises(ValueError, lambda: call(other, MAP), *shapes(MAP, other))


@pytest.mark.parametrize(
    "call",
    [
        f.attention_transfer_loss,
        partial(f.attention_transfer_loss, spatial_adapter=lambda attention: attention),
        f.attention_masked_loss,
        f.non_local_loss,
        partial(f.attention_mask, temperature=1.0),
    ],
)
def test_functions_name_both_shapes_where_the_channels_differ(call):
    raises(ValueError, lambda: call(MAP, OTHER_CHANNELS), *shapes(MAP, OTHER_CHANNELS))
    raises(ValueError, lambda: call(MAP, ONE), *shapes(MAP, ONE))  # would broadcast
    raises(ValueError, lambda: call(MAP, MAP[:1]), *shapes(MAP, MAP[:1]))  # so would this


@each({name: TWO_MAPS[name] for name in TWO_MAPS if name[0].isupper()})
def test_modules_name_the_channels_that_they_were_built_for(call):
    raises(ValueError, lambda: call(OTHER_CHANNELS, MAP), "`student", 3, *shapes(OTHER_CHANNELS))
    raises(ValueError, lambda: call(MAP, OTHER_CHANNELS), "`teacher", 3, *shapes(OTHER_CHANNELS))


def test_the_relation_module_names_the_channels_that_it_was_built_for():
    block = featkd.NonLocalRelation(3, kind="gaussian")
    raises(ValueError, lambda: block(OTHER_CHANNELS), "`features`", 3, *shapes(OTHER_CHANNELS))


@each(TWO_ALIKE)
def test_other_device(call):
    raises(ValueError, lambda: call(MAP, META), "cpu", "meta")
    raises(ValueError, lambda: call(META, MAP), "cpu", "meta")


# --- relations ------------------------------------------------------------------------------------

BAD_RELATION = {
    "theta_batch": (OTHER_BATCH, MAP, MAP),
    "phi_batch": (MAP, OTHER_BATCH, MAP),
    "phi_channels": (MAP, OTHER_CHANNELS, MAP),
    "g_batch": (MAP, MAP, OTHER_BATCH),
    "g_positions": (MAP, MAP, OTHER_SIZE),
    "phi_positions": (MAP, OTHER_SIZE, MAP),
    "g_as_a_sequence": (MAP, MAP, MAP.flatten(2)),
}


@each(RELATIONS)
@pytest.mark.parametrize("arguments", BAD_RELATION.values(), ids=BAD_RELATION)
def test_relation_shapes(call, arguments):
    shape = tuple(MAP.shape)
    odd = next(tuple(x.shape) for x in arguments if tuple(x.shape) != shape)
    raises(ValueError, lambda: call(*arguments), shape, odd)


def test_gaussian_relation_shapes():
    for g in (OTHER_BATCH, OTHER_SIZE, MAP.flatten(2)):
        raises(ValueError, lambda g=g: f.gaussian_relation(MAP, g), *shapes(MAP, g))


def test_concatenation_relation_shapes():
    call = f.concatenation_relation
    raises(ValueError, lambda: call(MAP, MAP, MAP), *shapes(MAP))  # more than one logit a side
    raises(ValueError, lambda: call(ONE, MAP, MAP), *shapes(ONE, MAP))
    raises(ValueError, lambda: call(MAP, ONE, MAP), *shapes(MAP, ONE))
    raises(ValueError, lambda: call(ONE, ONE, OTHER_SIZE), *shapes(ONE, OTHER_SIZE))
    raises(ValueError, lambda: call(ONE, ONE[:1], MAP), *shapes(ONE, ONE[:1]))


@each(RELATIONS | {"concatenation_relation": f.concatenation_relation})
@pytest.mark.parametrize("position", [0, 1, 2])
def test_relation_arguments(call, position):
    def with_(value):
        arguments = [ONE, ONE, MAP]
        arguments[position] = value
        return lambda: call(*arguments)

    name = f"`{('theta', 'phi', 'g')[position]}`"
    raises(TypeError, with_(None), name)
    raises(TypeError, with_(ONE.long()), name, torch.int64)
    raises(ValueError, with_(FLAT), name, *shapes(FLAT))
    raises(ValueError, with_(MAP[:, :0]), name)
    raises(ValueError, with_(META), "cpu", "meta")


def test_gaussian_relation_arguments():
    raises(TypeError, lambda: f.gaussian_relation(None, MAP), "`features`")
    raises(TypeError, lambda: f.gaussian_relation(MAP.long(), MAP), "`features`")
    raises(ValueError, lambda: f.gaussian_relation(FLAT, MAP), "`features`", *shapes(FLAT))
    raises(TypeError, lambda: f.gaussian_relation(MAP, None), "`g`")


@pytest.mark.parametrize("scale", ["1", None, True])
def test_scale_of_another_kind(scale):
    call = partial(f.embedded_gaussian_relation, MAP, MAP, MAP)
    raises(TypeError, lambda: call(scale=scale), "`scale`", type(scale).__name__)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_out_of_range(scale):
    call = partial(f.embedded_gaussian_relation, MAP, MAP, MAP)
    raises(ValueError, lambda: call(scale=scale), "`scale`", scale)


# --- masks and adapters ---------------------------------------------------------------------------

BAD_MASKS = {
    "spatial_mask": [torch.ones(2, 5, 4), torch.ones(2, 1, 4, 5), torch.ones(4, 5), ONE[:1, 0]],
    "channel_mask": [torch.ones(2, 1), torch.ones(2, 3, 1, 1), torch.ones(3), torch.ones(1, 3)],
}


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name, masks in BAD_MASKS.items() for mask in masks],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_mask_shape(name, mask):
    call = partial(f.attention_masked_loss, MAP, MAP, **{name: mask})
    right = (2, 4, 5) if name == "spatial_mask" else (2, 3)
    raises(ValueError, call, f"`{name}`", right, *shapes(mask))


@pytest.mark.parametrize(("name", "shape"), [("spatial_mask", (2, 4, 5)), ("channel_mask", (2, 3))])
def test_mask_kind(name, shape):
    call = partial(f.attention_masked_loss, MAP, MAP)
    raises(TypeError, lambda: call(**{name: [1.0]}), f"`{name}`", "list")
    raises(TypeError, lambda: call(**{name: torch.ones(shape, dtype=torch.bool)}), f"`{name}`")
    raises(ValueError, lambda: call(**{name: torch.ones(shape, device="meta")}), "cpu", "meta")


@pytest.mark.parametrize("shape", [(5,), (2,), ()], ids=str)
def test_attention_mask_of_no_image(shape):
    attention = torch.ones(shape)
    raises(ValueError, lambda: f.attention_mask(attention, attention, temperature=1.0), shape)


BAD_RESULTS = {
    "spatial_adapter": [torch.ones(2, 4, 5), torch.ones(2, 1, 2, 3), torch.ones(2, 3, 4, 5)],
    "channel_adapter": [torch.ones(2, 1), torch.ones(2, 7), torch.ones(2, 3, 1)],
}


@pytest.mark.parametrize(
    ("name", "result"),
    [(name, result) for name, results in BAD_RESULTS.items() for result in results],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_adapter_result(name, result):
    call = partial(f.attention_transfer_loss, MAP, MAP, **{name: lambda attention: result})
    right = (2, 1, 4, 5) if name == "spatial_adapter" else (2, 3)
    raises(ValueError, call, f"`{name}`", right, *shapes(result))


@pytest.mark.parametrize("name", ["spatial_adapter", "channel_adapter"])
def test_adapter_kind(name):
    call = partial(f.attention_transfer_loss, MAP, MAP)
    raises(TypeError, lambda: call(**{name: "conv"}), f"`{name}`", "str")
    raises(TypeError, lambda: call(**{name: MAP}), f"`{name}`", "Tensor")
    raises(TypeError, lambda: call(**{name: lambda attention: None}), f"`{name}`", "NoneType")


# --- options --------------------------------------------------------------------------------------

MAPS = (MAP, MAP)
masked_module = partial(featkd.AttentionMaskedLoss, 3, 3)
hyperparameters = partial(featkd.Hyperparameters, 1.0, 1.0, 1.0)
TEMPERATURES = {
    "attention_mask": partial(f.attention_mask, *MAPS),
    "AttentionMask": featkd.AttentionMask,
    "AttentionMaskedLoss": masked_module,
    "Hyperparameters": hyperparameters,
}


@each(TEMPERATURES)
@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, float("nan"), float("inf"), -float("inf")])
def test_temperature_out_of_range(call, value):
    raises(ValueError, lambda: call(temperature=value), "`temperature`", value)


@each(TEMPERATURES)
@pytest.mark.parametrize("value", ["0.5", True, None, [0.5], torch.tensor(0.5)], ids=str)
def test_temperature_of_another_kind(call, value):
    raises(TypeError, lambda: call(temperature=value), "`temperature`", type(value).__name__)


transfer_module = partial(featkd.AttentionTransferLoss, 3, 3)
masked_module = partial(featkd.AttentionMaskedLoss, 3, 3, temperature=0.5)
non_local_module = partial(featkd.NonLocalLoss, 3, 3, kind="gaussian")
settings = partial(featkd.Hyperparameters, 1.0, 1.0, 1.0, 0.5)
total = partial(featkd.FeatureDistillationLoss, 3, 3, hyperparameters=featkd.TWO_STAGE)

CHOICES = {
    "fusion": [
        partial(f.attention_mask, *MAPS, temperature=0.5),
        partial(featkd.AttentionMask, 0.5),
        masked_module,
        settings,
    ],
    "reduction": [
        partial(f.attention_transfer_loss, *MAPS),
        partial(f.attention_masked_loss, *MAPS),
        partial(f.non_local_loss, *MAPS),
        transfer_module,
        masked_module,
        non_local_module,
        settings,
    ],
    "kind": [
        partial(featkd.NonLocalRelation, 3),
        partial(featkd.NonLocalLoss, 3, 3),
        settings,
    ],
    "attention": [transfer_module, masked_module],
    "transfer_attention": [settings],
    "masked_attention": [settings],
    "teacher_relation": [non_local_module, settings],
    "resize": [transfer_module, masked_module, non_local_module, total],
}
FLAGS = {
    "absolute": [
        partial(f.spatial_attention, MAP),
        partial(f.channel_attention, MAP),
        partial(f.attention_transfer_loss, *MAPS),
        featkd.SpatialAttention,
        featkd.ChannelAttention,
        transfer_module,
        settings,
    ],
    "residual": [partial(featkd.NonLocalRelation, 3, kind="gaussian"), non_local_module, settings],
    "normalize": [transfer_module, masked_module, non_local_module, settings, total],
}


def options(table):
    return pytest.mark.parametrize(
        ("name", "call"), [(name, call) for name, calls in table.items() for call in calls]
    )


@options(CHOICES)
@pytest.mark.parametrize("value", ["", "Mean", "bogus"])
def test_unknown_choice(name, call, value):
    raises(ValueError, lambda: call(**{name: value}), f"`{name}`", repr(value))


@options(CHOICES)
@pytest.mark.parametrize("value", [1, True, ["mean"]], ids=str)
def test_choice_of_another_kind(name, call, value):
    raises(TypeError, lambda: call(**{name: value}), f"`{name}`", type(value).__name__)


@options({name: calls for name, calls in CHOICES.items() if name != "resize"})
def test_none_is_no_choice(name, call):
    raises(TypeError, lambda: call(**{name: None}), f"`{name}`", "None")


@options(FLAGS)
@pytest.mark.parametrize("value", [1, "yes"])
def test_flag_of_another_kind(name, call, value):
    raises(TypeError, lambda: call(**{name: value}), f"`{name}`", type(value).__name__)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_weights(name):
    right = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "temperature": 0.5}
    for value in (-1.0, float("nan"), float("inf")):
        wrong = right | {name: value}
        raises(ValueError, lambda w=wrong: featkd.Hyperparameters(**w), f"`{name}`", value)
    for value in ("1", None, True):
        wrong = right | {name: value}
        raises(TypeError, lambda w=wrong: featkd.Hyperparameters(**w), f"`{name}`")


# --- counts ---------------------------------------------------------------------------------------

COUNTS = {
    "transfer-student": ("student_channels", lambda n: featkd.AttentionTransferLoss(n, 3)),
    "transfer-teacher": ("teacher_channels", lambda n: featkd.AttentionTransferLoss(3, n)),
    "masked-student": (
        "student_channels",
        lambda n: featkd.AttentionMaskedLoss(n, 3, temperature=1.0),
    ),
    "masked-teacher": (
        "teacher_channels",
        lambda n: featkd.AttentionMaskedLoss(3, n, temperature=1.0),
    ),
    "relation": ("in_channels", lambda n: featkd.NonLocalRelation(n, kind="gaussian")),
    "relation-inter": (
        "inter_channels",
        lambda n: featkd.NonLocalRelation(3, kind="gaussian", inter_channels=n),
    ),
    "relation-subsample": (
        "subsample",
        lambda n: featkd.NonLocalRelation(3, kind="gaussian", subsample=n),
    ),
    "non_local-student": (
        "student_channels",
        lambda n: featkd.NonLocalLoss(n, 3, kind="gaussian"),
    ),
    "non_local-teacher": (
        "teacher_channels",
        lambda n: featkd.NonLocalLoss(3, n, kind="gaussian"),
    ),
    "non_local-inter": ("inter_channels", lambda n: non_local_module(inter_channels=n)),
    "non_local-subsample": ("subsample", lambda n: non_local_module(subsample=n)),
    "total-student": (
        "student_channels",
        lambda n: featkd.FeatureDistillationLoss(n, 3, hyperparameters=featkd.TWO_STAGE),
    ),
    "total-teacher": (
        "teacher_channels",
        lambda n: featkd.FeatureDistillationLoss(3, n, hyperparameters=featkd.TWO_STAGE),
    ),
    "total-inter": ("inter_channels", lambda n: total(inter_channels=n)),
    "total-subsample": ("subsample", lambda n: total(subsample=n)),
    "total-level": (
        "student_channels",
        lambda n: featkd.FeatureDistillationLoss(
            {"c3": 3, "c4": n}, {"c3": 3, "c4": 3}, hyperparameters=featkd.TWO_STAGE
        ),
    ),
}
each_count = pytest.mark.parametrize(("name", "build"), COUNTS.values(), ids=COUNTS)


@each_count
@pytest.mark.parametrize("value", [0, -1])
def test_count_out_of_range(name, build, value):
    raises(ValueError, lambda: build(value), f"`{name}", value)


@each_count
@pytest.mark.parametrize("value", ["8", 2.5, True], ids=str)
def test_count_of_another_kind(name, build, value):
    raises(TypeError, lambda: build(value), f"`{name}", type(value).__name__)


# --- levels ---------------------------------------------------------------------------------------

CHANNELS = {"c3": 3, "c4": 3}
LEVELS = {"c3": MAP, "c4": OTHER_SIZE}


@pytest.fixture
def by_level():
    return featkd.FeatureDistillationLoss(CHANNELS, CHANNELS, hyperparameters=featkd.TWO_STAGE)


def test_channels_of_other_levels():
    def build(student, teacher, **options):
        return lambda: featkd.FeatureDistillationLoss(
            student, teacher, hyperparameters=featkd.TWO_STAGE, **options
        )

    raises(ValueError, build(CHANNELS, {"c3": 3}), "c4")
    raises(ValueError, build({"c3": 3}, CHANNELS), "c4")
    raises(ValueError, build(CHANNELS, {"c3": 3, "p4": 3}), "c4", "p4")
    raises(ValueError, build({}, {}))
    raises(TypeError, build(CHANNELS, 3))
    raises(TypeError, build(3, CHANNELS))
    raises(TypeError, build([3, 3], [3, 3]))
    raises(ValueError, build(CHANNELS, CHANNELS, subsample={"c3": 2}), "c4")
    raises(ValueError, build(CHANNELS, CHANNELS, inter_channels=CHANNELS | {"c5": 2}), "c5")
    raises(TypeError, build(3, 3, subsample={"features": "2"}))


def test_level_names_that_no_module_can_carry():
    for name in ("", "keys", "training"):
        channels = {name: 3}
        raises(
            ValueError,
            lambda channels=channels: featkd.FeatureDistillationLoss(
                channels, channels, hyperparameters=featkd.TWO_STAGE
            ),
        )


def test_missing_level(by_level):
    raises(ValueError, lambda: by_level({"c3": MAP}, LEVELS), "student", "c4")
    raises(ValueError, lambda: by_level(LEVELS, {"c3": MAP}), "teacher", "c4")


def test_extra_level(by_level):
    raises(ValueError, lambda: by_level(LEVELS | {"c5": MAP}, LEVELS), "student", "c5")
    raises(ValueError, lambda: by_level(LEVELS, LEVELS | {"c5": MAP}), "teacher", "c5")


def test_tensors_where_a_mapping_belongs(by_level):
    raises(TypeError, lambda: by_level(MAP, LEVELS), "student", "Tensor")
    raises(TypeError, lambda: by_level(LEVELS, MAP), "teacher", "Tensor")
    raises(TypeError, lambda: by_level([MAP, MAP], LEVELS), "student", "list")


def test_a_mapping_where_tensors_belong():
    raises(TypeError, lambda: TOTAL({"features": MAP}, MAP), "student", "dict")
    raises(TypeError, lambda: TOTAL(MAP, {"features": MAP}), "teacher", "dict")


def test_shapes_of_a_level(by_level):
    wrong = LEVELS | {"c4": MAP}
    raises(ValueError, lambda: by_level(wrong, LEVELS), *shapes(MAP, OTHER_SIZE))


def test_hyperparameters_of_another_kind():
    for value in (None, {"alpha": 1.0}, "TWO_STAGE", featkd.Hyperparameters):
        raises(
            TypeError,
            lambda value=value: featkd.FeatureDistillationLoss(3, 3, hyperparameters=value),
            "`hyperparameters`",
        )


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_resize_does_not_excuse_another_batch(resize):
    loss = featkd.AttentionMaskedLoss(3, 3, temperature=0.5, resize=resize)
    other = torch.ones(1, 3, 8, 8)
    raises(ValueError, lambda: loss(other, MAP), *shapes(MAP))
