"""Random arguments at every public callable: a sound value, or an error in featkd's own words."""

import math
import re
import traceback

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import featkd
from featkd.testing import LAYOUTS
from tests.helpers import misuse_taps
from tests.helpers.misuse import ROWS
from tests.helpers.misuse_kinds import ERROR, GENERATOR, MAP, tensors_in
from tests.helpers.misuse_taps import IMAGE, TEACHER, TwoHeads

DTYPES = [torch.float32] * 4 + [torch.float64, torch.float16, torch.bfloat16]
ODD_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2]
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
MAPS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
NUMBERS = [0, 1, 2, 3, -1, 0.0, 0.5, 1e-3, 1e30, 10**30, 10**400, -2.5, math.nan, math.inf, True]
STRINGS = ["", "mean", "none", "both", "gaussian", "bilinear", "trained", "body", "twice", "c1"]
STRINGS += ["body[0]", "several[low]", "body:input", "body.9", "[", "features", "\0", "é" * 9]


def tensors(shapes):
    """Of any dtype, layout and device; finite."""

    def build(shape, dtype, layout, device, seed):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if layout == "sparse":
            return x.to_sparse()
        x = x.to(dtype)
        if x.dim() == 4 and layout in LAYOUTS:
            x = LAYOUTS[layout](x) if dtype.is_floating_point else x.transpose(2, 3)
        return x.requires_grad_(layout == "leaf" and dtype in DTYPES).to(device)

    layouts = st.sampled_from(["plain", "leaf", "leaf", "sparse", *LAYOUTS])
    dtypes = st.sampled_from(DTYPES * 3 + ODD_DTYPES)
    devices = st.sampled_from(["cpu"] * 9 + ["meta"])
    return st.builds(build, shapes, dtypes, layouts, devices, st.integers(0, 99))


def returns(value):
    return lambda *args, **kwargs: value


SIMPLE = st.one_of(
    st.none(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(STRINGS),
    st.text(max_size=6),
)
FUNCTIONS = st.sampled_from(
    [returns(None), returns(MAP), returns({}), lambda x: x, lambda x: x * 0, len]
)
# All of them take an image or a map.
MODULES = st.sampled_from([nn.Identity(), nn.Tanh(), nn.Flatten(), TEACHER, TwoHeads(3), nn.ReLU])
VALUES = st.one_of(SIMPLE, FUNCTIONS, MODULES, tensors(SHAPES), tensors(MAPS))
KEYS = st.one_of(st.sampled_from(["c1", "c2", "c3", "c4", "features", "a.b"]), SIMPLE)
ANYTHING = st.one_of(
    SIMPLE,
    VALUES,
    st.lists(VALUES, max_size=3),
    st.lists(VALUES, max_size=3).map(tuple),
    st.dictionaries(KEYS, VALUES, max_size=2),
    st.dictionaries(KEYS, st.lists(VALUES, max_size=3).map(tuple), max_size=2),
    st.dictionaries(st.sampled_from(["c1", "c3", "c4"]), st.sampled_from(STRINGS), max_size=2),
    st.builds(object),
    st.just(torch.float32),
    st.just(object),
)


@st.composite
def arguments(draw, row):
    """Mostly right ones; the tensors often of one other shape."""
    shape = draw(MAPS)
    chosen = {}
    for name in sorted({*row.right, *row.wrong}):
        how = draw(st.integers(0, 9))
        if name in row.right and how < 5:
            chosen[name] = row.right[name]
        elif isinstance(row.right.get(name), torch.Tensor) and how < 8:
            of_right = st.sampled_from([shape, tuple(row.right[name].shape)])
            chosen[name] = draw(tensors(of_right))
        elif how > 6 or name in row.right:
            choices = [wrong.value for wrong in row.wrong.get(name, [])]
            strategies = [ANYTHING, st.sampled_from(choices)] if choices else [ANYTHING]
            chosen[name] = draw(st.one_of(strategies))
    return chosen


# What Python itself says of a call that does not fit, of a function that the caller gave too.
PYTHON = r"takes .* arguments?|missing \d+ required|unexpected keyword|multiple values"

# What an assertion of featkd.testing says of the loss that it was given.
ASSERTION = r"assert_\w+: .* must |\w+: the loss must (not fail|give one value)"


def used(result):
    """What a user does next with it."""
    if isinstance(result, featkd.FeatureTap):
        try:
            with result:
                result.model(IMAGE)
                return result.pop()
        finally:
            result.remove()
    if isinstance(result, featkd.Distiller):
        return result(IMAGE)
    channels = getattr(result, "student_channels", None), getattr(result, "teacher_channels", None)
    if isinstance(result, featkd.FeatureDistillationLoss) and result.single:
        channels = result.channels["features"]
    if isinstance(result, nn.Module) and None not in channels:
        return result(*(torch.randn(2, c, 4, 5, generator=GENERATOR) for c in channels))
    if isinstance(result, featkd.Hyperparameters):
        return used(featkd.FeatureDistillationLoss(3, 2, hyperparameters=result))
    return result


def finite(value):
    """All numbers that torch can look at."""
    return all(
        x.is_meta or x.layout != torch.strided or x.dtype.itemsize < 2 or bool(x.isfinite().all())
        for x in tensors_in(value)
    )


def finding(call, given):
    """What is wrong with the outcome of a call, if anything."""
    try:
        result = used(call(**given))
    except (TypeError, ValueError, RuntimeError) as error:
        # A caller's adapter that takes images, given a channel map, is the caller's to mend.
        raised_by = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
        own = re.fullmatch(ERROR, str(error), re.DOTALL) or misuse_taps.__file__ in raised_by
        python = isinstance(error, TypeError) and re.search(PYTHON, str(error))
        return None if own or python else repr(error)
    except AssertionError as error:
        return None if re.match(ASSERTION, str(error)) else repr(error)
    if not finite(list(given.values())) or "nan" in str(given):
        return None
    scale = given.get("scale")
    if isinstance(scale, int | float) and abs(scale) > 1e30:
        return None  # NaN where logits may pass the largest number, as its docstring says
    hidden = any(x.isnan().any() for x in tensors_in(result) if not x.is_meta)
    return f"NaN of finite numbers: {result}" if hidden else None


@pytest.fixture(autouse=True)
def every_warning():
    """Also those that torch gives once a process: an example must fail when it is repeated."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


CALLED = [row for row in ROWS if row.right or row.wrong]


@pytest.mark.parametrize("row", CALLED, ids=repr)
@hypothesis.given(data=st.data())
@hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
def test_any_arguments_give_a_sound_value_or_an_error_in_featkds_words(row, data):
    assert finding(row.call, data.draw(arguments(row))) is None
