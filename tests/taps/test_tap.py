"""FeatureTap: what it captures, when, and what it says when it cannot."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from featkd import FeatureTap
from tests.helpers.models import LEVELS, Net, images, raises
from tests.helpers.tapped import (
    Checkpointed,
    HasModule,
    captured,
    captures_what_plain_hooks_see,
    doubled,
)
from tests.helpers.tensors import close

# --- capturing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers", [LEVELS, list(LEVELS.values()), tuple(LEVELS.values())], ids=type
)
@pytest.mark.parametrize("clone", [True, False])
def test_captures_what_a_plain_hook_sees(layers, clone):
    model = Net()
    tap = FeatureTap(model, layers, clone=clone)
    features = captures_what_plain_hooks_see(tap, model, lambda: model(images()))
    assert all(feature.requires_grad for feature in features.values())


def test_the_output_of_the_model_itself_can_be_tapped():
    model = Net()
    captures_what_plain_hooks_see(FeatureTap(model, [""]), model, lambda: model(images()))


def test_nothing_is_captured_outside_the_with_block():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    model(images())
    with tap:
        pass
    model(images())
    raises(RuntimeError, tap.pop, "got 0")


def test_entering_forgets_what_was_left():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    with tap:
        model(images(seed=1))
    features = captures_what_plain_hooks_see(tap, model, lambda: model(images(seed=2)))
    assert features.keys() == LEVELS.keys()


def test_entering_forgets_that_gradients_were_recorded():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    with tap:
        model(images())
    with tap:
        with torch.no_grad():
            model.backbone(images())
        assert not tap.pop()["c1"].requires_grad


def test_what_was_captured_can_be_popped_after_the_block():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    with tap:
        model(images())
    assert tap.pop().keys() == LEVELS.keys()


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("head")


def test_an_exception_in_the_forward_passes_through_and_pins_nothing():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    head, model.head = model.head, Failing()
    with pytest.raises(KeyError, match="head"), tap:
        model(images())
    raises(RuntimeError, tap.pop, "got 0")
    model.head = head
    captures_what_plain_hooks_see(tap, model, lambda: model(images()))


def test_a_second_pop_is_an_error():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        model(images())
        tap.pop()
        raises(RuntimeError, tap.pop, "c1", "backbone.c1", "got 0")
        model(images())
        assert tap.pop().keys() == LEVELS.keys()


class Saved:
    """Stands for a tensor that a graph keeps for its backward."""


@contextmanager
def graphs():
    """What the graphs recorded inside the block keep; empty once they are gone."""
    alive = weakref.WeakSet()

    def pack(tensor):
        saved = Saved()
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: None):
        yield alive


def test_nothing_is_pinned_after_pop():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        with graphs() as alive:
            model(images())
        features = tap.pop()
        feature = weakref.ref(features["c1"])
        assert alive
        del features
        assert feature() is None
        assert not alive


def test_a_hook_that_outlives_its_tap_pins_nothing():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    kept = [list(module._forward_hooks.values()) for module in model.modules()]
    with tap, graphs() as alive:
        model(images())
    assert any(kept)
    assert alive
    del tap
    assert not alive


def test_under_inference_mode_a_capture_is_a_copy_as_no_change_would_show():
    model, batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = model[0](batch)
        with FeatureTap(model, ["0"], clone=False) as tap:
            model(batch)
            assert torch.equal(tap.pop()["0"], expected)


def test_two_captures_of_one_name_are_an_error():
    layers = {"c[0]": "backbone.c1", "c": "backbone.c2"}
    said = "`layers` must hold no name of a capture of 'c', got 'c[0]'."
    raises(ValueError, lambda: FeatureTap(Net(), layers, calls={"c": 2}), said)
    FeatureTap(Net(), layers)


def test_a_tapped_truth_needs_no_gradient():
    class Bright(nn.Module):
        def forward(self, x):
            return x > 0

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Bright())
    with FeatureTap(model, ["1"]) as tap:
        output = model(torch.randn(2, 3, 8, 8))
        assert torch.equal(tap.pop()["1"], output)


def test_a_second_pop_says_that_the_first_had_the_features():
    model = Net()
    tap = FeatureTap(model, {"c1": "backbone.c1"})
    with tap:
        for _ in range(2):
            model(images())
            tap.pop()
            said = "(alias 'c1'), got 0 since the last `pop`, whose result is to be kept: run the"
            raises(RuntimeError, tap.pop, said)
    with tap:
        raises(RuntimeError, tap.pop, "(alias 'c1'), got 0: run the model itself")


def test_a_module_that_did_not_run_is_an_error():
    model = Net()
    tap = FeatureTap(model, {"head": "head"})
    with tap:
        model.backbone(images())
        said = (
            "`pop` must follow 1 call(s) of 'head' (alias 'head'), got 0: run the model itself, no "
            "traced or exported copy, inside the `with` block once before each pop, calling "
            "modules and not their `.forward`; a model compiled and called before the tap was made "
            "never calls its hooks: make the tap first, or call `torch.compiler.reset()`."
        )
        raises(RuntimeError, tap.pop, said)


def test_a_module_that_ran_too_often_is_an_error():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        model(images())
        model(images())
        said = (
            "'backbone.c1' (alias 'c1'), got 2: pop after every forward inside the `with` block; "
            "for a module that runs several times in one forward pass `calls={'c1': 2}`."
        )
        raises(RuntimeError, tap.pop, said)


def test_a_shared_head_gives_one_feature_for_each_call():
    head = nn.Conv2d(3, 2, 1).double()
    model = nn.ModuleDict({"head": head})
    levels = [images(seed=seed) for seed in range(5)]
    with FeatureTap(model, {"p": "head"}, calls={"p": 5}) as tap:
        outputs = [head(level) for level in levels]
        features = tap.pop()
        assert list(features) == [f"p[{index}]" for index in range(5)]
        for output, feature in zip(outputs, features.values(), strict=True):
            close(feature, output, 0.0)
        head(levels[0])
        raises(RuntimeError, tap.pop, "5 call(s)", "got 1")


# --- in-place operations behind the module --------------------------------------------------------


class AddsInPlace(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3).double()
        self.inplace = inplace

    def forward(self, x):
        x = self.first(x)
        if self.inplace:
            x += 1.0
        else:
            x = x + 1.0
        return x.square()


CHANGED_IN_PLACE = {
    "relu": (lambda inplace: Net(inplace=inplace), "backbone.c1.norm"),
    "add": (AddsInPlace, "first"),
}
each_in_place = pytest.mark.parametrize(
    ("make", "path"), CHANGED_IN_PLACE.values(), ids=CHANGED_IN_PLACE
)


@each_in_place
def test_a_clone_has_the_value_and_gradient_of_the_model_without_in_place(make, path):
    in_place, plain = make(True), make(False)
    plain.load_state_dict(in_place.state_dict())
    values, gradients = [], []
    for model in (in_place, plain):
        with FeatureTap(model, [path]) as tap:
            output = model(images())
            feature = tap.pop()[path]
        (feature.square().mean() + output.square().mean()).backward()
        values.append(feature)
        gradients.append([parameter.grad for parameter in model.parameters()])
    close(values[0], values[1], 0.0)
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected, 1e-14)


@each_in_place
def test_without_a_clone_a_change_in_place_is_an_error(make, path):
    model = make(True)
    with FeatureTap(model, {"c": path}, clone=False) as tap:
        model(images())
        raises(RuntimeError, tap.pop, "layers['c']", path, "clone=True")


def test_without_a_clone_the_feature_is_the_models_own():
    model = Net(inplace=False)
    seen = []
    model.backbone.c1.register_forward_hook(lambda module, args, output: seen.append(output))
    batch, layers = images(), LEVELS | {"x": "backbone:input"}
    features = captured(FeatureTap(model, layers, clone=False), lambda: model(batch))
    assert features["c1"] is seen[0]
    assert features["x"] is batch


# --- gradients that are not there -----------------------------------------------------------------


def check_recomputing(model, layers):
    """The backward runs the tapped modules again, which neither adds nor overwrites."""
    plain = Net()
    values, expected = model.state_dict().values(), plain.state_dict()
    plain.load_state_dict(dict(zip(expected, values, strict=True)))
    gradients = []
    for net in (model, plain):
        with FeatureTap(net, layers) as tap:
            net(images()).square().mean().backward()
            before = tap.pop()
            raises(RuntimeError, tap.pop, "got 0")
            output = net(images())
            features = tap.pop()
            loss = sum(feature.square().mean() for feature in features.values())
            (loss + output.square().mean()).backward()
            raises(RuntimeError, tap.pop, "got 0")
        for alias, feature in features.items():
            close(feature, before[alias], 0.0)
        gradients.append([parameter.grad for parameter in net.parameters()])
    for ours, wanted in zip(*gradients, strict=True):
        close(ours, wanted, 1e-14)


def test_non_reentrant_checkpointing_neither_adds_nor_overwrites():
    check_recomputing(Checkpointed(use_reentrant=False), LEVELS)


def test_the_checkpoint_wrapper_neither_adds_nor_overwrites():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    model = Net()
    model.backbone.c1 = wrappers.checkpoint_wrapper(model.backbone.c1)
    model.backbone.c2 = wrappers.checkpoint_wrapper(model.backbone.c2)
    check_recomputing(model, LEVELS)


def test_reentrant_checkpointing_outside_the_tapped_module_neither_adds_nor_overwrites():
    model = Checkpointed(use_reentrant=True)
    with FeatureTap(model, ["head"]) as tap:
        model(images()).square().mean().backward()
        assert tap.pop()["head"].requires_grad
    with FeatureTap(model, {"x": "backbone:input"}) as tap:
        model(images()).square().mean().backward()
        close(tap.pop()["x"], images(), 0.0)
        raises(RuntimeError, tap.pop, "got 0")


def test_a_tap_inside_reentrant_checkpointing_is_an_error():
    model = Checkpointed(use_reentrant=True)
    with FeatureTap(model, LEVELS) as tap:
        output = model(images())
        raises(RuntimeError, tap.pop, "'backbone.c1'", "use_reentrant=False")
        output.sum().backward()


def test_it_is_found_where_another_method_than_forward_is_called():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Checkpointed(use_reentrant=True)

        def extract_feat(self, images):
            return self.body(images)

    model = Detector()
    with FeatureTap(model, ["body.backbone.c1"]) as tap:
        model.extract_feat(images())
        raises(RuntimeError, tap.pop, "'body.backbone.c1'", "use_reentrant=False")


def test_reentrant_checkpointing_is_found_beside_an_attribute_called_module():
    class Both(HasModule):
        def forward(self, x):
            with torch.no_grad():
                x = self.module(x)
            return checkpoint(self.neck, x.requires_grad_(), use_reentrant=True)

    model = Both()
    with FeatureTap(model, ["neck"]) as tap:
        model(images())
        raises(RuntimeError, tap.pop, "'neck'")


def test_a_part_of_the_model_without_gradient_is_an_error():
    model = Net()
    model.backbone.requires_grad_(False)
    with FeatureTap(model, LEVELS) as tap:
        model(images())
        said = (
            f"`layers` must carry a gradient each, got none at {LEVELS}: parameters are frozen "
            "(leave these levels out, here and in the loss), or they run under `no_grad`, "
            "`inference_mode` or reentrant checkpointing (take `use_reentrant=False`); call a "
            "teacher under `torch.no_grad()`."
        )
        raises(RuntimeError, tap.pop, said)


def frozen(model):
    model.requires_grad_(False)(images())


def without_grad(model):
    with torch.no_grad():
        model(images())


def in_inference_mode(model):
    with torch.inference_mode():
        model(images())


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("call", [frozen, without_grad, in_inference_mode])
def test_a_teacher_without_gradients_raises_no_alarm(call, clone):
    model = Net(inplace=False)
    features = captured(FeatureTap(model, LEVELS, clone=clone), lambda: call(model))
    assert not features["c1"].requires_grad


def test_a_part_called_without_gradients_after_the_whole_with_raises_no_alarm():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        model(images())
        tap.pop()
        with torch.no_grad():
            model.backbone(images())
        assert not tap.pop()["c1"].requires_grad


def test_a_part_beside_the_tapped_one_called_with_gradients_raises_no_alarm():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        with torch.no_grad():
            features = model.backbone(images())
        assert model.head(features).requires_grad
        assert not tap.pop()["c1"].requires_grad


# --- misuse ---------------------------------------------------------------------------------------


MISUSE = {
    "no module": (TypeError, lambda: FeatureTap("model", ["a"]), "str"),
    "DataParallel": (TypeError, lambda: FeatureTap(nn.DataParallel(Net()), ["head"]), "DataPar"),
    "a string of layers": (TypeError, lambda: FeatureTap(Net(), "head"), "str"),
    "a set of layers": (TypeError, lambda: FeatureTap(Net(), {"head"}), "set"),
    "a path of another type": (TypeError, lambda: FeatureTap(Net(), {"c": 4}), "'c': 4"),
    "an alias of another type": (TypeError, lambda: FeatureTap(Net(), {4: "head"}), "4: 'head'"),
    "a module for a path": (TypeError, lambda: FeatureTap(Net(), [nn.ReLU()]), "ReLU"),
    "no layers": (ValueError, lambda: FeatureTap(Net(), []), "[]"),
    "one path twice": (ValueError, lambda: FeatureTap(Net(), ["head", "head"]), "'head'"),
    "an open bracket": (ValueError, lambda: FeatureTap(Net(), ["head[0"]), "'head[0'"),
    "an empty selector": (ValueError, lambda: FeatureTap(Net(), ["head[]"]), "'head[]'"),
    "neither input nor output": (ValueError, lambda: FeatureTap(Net(), ["head:out"]), "head:out"),
    "clone of another type": (TypeError, lambda: FeatureTap(Net(), LEVELS, clone=1), "`clone`"),
    "calls of another type": (
        TypeError,
        lambda: FeatureTap(Net(), LEVELS, calls={"c1": 1.0}),
        "`calls['c1']`",
    ),
    "no calls": (ValueError, lambda: FeatureTap(Net(), LEVELS, calls={"c1": 0}), "got 0"),
    "calls of an unknown alias": (
        ValueError,
        lambda: FeatureTap(Net(), LEVELS, calls={"c3": 2}),
        "'c3'",
    ),
    "calls that are no mapping": (
        TypeError,
        lambda: FeatureTap(Net(), LEVELS, calls=5),
        "alias to count, got int.",
    ),
    "convert of an unknown alias": (
        ValueError,
        lambda: FeatureTap(Net(), LEVELS, convert={"c3": doubled}),
        "'c3'",
    ),
    "convert to no function": (
        TypeError,
        lambda: FeatureTap(Net(), LEVELS, convert={"c1": "NHWC"}),
        "`convert['c1']` must be callable, got str.",
    ),
    "convert of another type": (
        TypeError,
        lambda: FeatureTap(Net(), LEVELS, convert=doubled),
        "`convert` must be a mapping from alias to function, got function.",
    ),
}


@pytest.mark.parametrize(("error", "call", "mention"), MISUSE.values(), ids=MISUSE)
def test_misuse(error, call, mention):
    raises(error, call, mention)


def test_one_tap_cannot_be_entered_twice():
    tap = FeatureTap(Net(), LEVELS)
    with tap:
        said = "`with` must not be entered twice by one tap, got a tap in use."
        raises(RuntimeError, tap.__enter__, said)


def test_a_key_may_stand_in_quotes():
    class Pyramid(nn.Module):
        def forward(self, image):
            return {"X": image, "0": -image}

    model = nn.Sequential(Pyramid())
    with FeatureTap(model, {"a": "0['X']", "b": '0["0"]'}) as tap:
        model(torch.ones(1, 3, 4, 4))
        features = tap.pop()
    assert features["a"].sum() == 48
    assert features["b"].sum() == -48
