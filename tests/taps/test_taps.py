"""FeatureTap: what it captures, when, what it leaves behind, and what it says when it cannot."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import featkd
from featkd import FeatureTap, PatchTokens
from featkd.taps.paths import require_in_place, resolve
from tests.helpers.models import (
    LEVELS,
    Net,
    hook_count,
    images,
    plain_hooks,
    raises,
    snapshot,
    unchanged,
)
from tests.helpers.tensors import close, normal


def captured(tap, call):
    with tap:
        call()
        return tap.pop()


def captures_what_plain_hooks_see(tap, model, call):
    expected = plain_hooks(model, tap.layers.values(), call)
    features = captured(tap, call)
    assert list(features) == list(tap.layers)
    for alias, path in tap.layers.items():
        assert torch.equal(features[alias], expected[path])
    return features


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


# --- other layouts --------------------------------------------------------------------------------


def doubled(feature):
    return 2 * feature


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


# --- paths ----------------------------------------------------------------------------------------


def test_an_unknown_path_is_an_error_with_close_matches():
    raises(ValueError, lambda: FeatureTap(Net(), ["backbone.c3"]), "'backbone.c1'", "'backbone.c2'")
    raises(ValueError, lambda: FeatureTap(AveragedModel(Net()), ["backbone.c"]), "'backbone.c1'")


def test_an_unknown_path_that_is_like_none_is_an_error_without_a_hint():
    said = "must be the path of a module of the Net, got 'zzz'."
    raises(ValueError, lambda: FeatureTap(Net(), ["zzz"]), said)


def test_an_unknown_path_that_ends_others_is_an_error_with_the_first_three():
    model = nn.ModuleDict({name: nn.ModuleDict({"conv": nn.ReLU()}) for name in "abcd"})
    close_to = "(close: 'a.conv', 'b.conv', 'c.conv')."
    raises(ValueError, lambda: FeatureTap(model, ["conv"]), "got 'conv'", close_to)


def test_an_error_leaves_no_hook_behind():
    model = Net()
    raises(ValueError, lambda: FeatureTap(model, ["backbone.c1", "backbone.c3"]))
    gc.collect()
    assert hook_count(model) == 0


class Wrapper(nn.Module):
    """Stands for DDP, torch.compile, FSDP or a checkpoint wrapper, as named in a path."""

    def __init__(self, model, name):
        super().__init__()
        self.name = name
        self.add_module(name, model)

    def forward(self, *args):
        return getattr(self, self.name)(*args)


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_prefixes_can_be_left_out_or_written(name):
    model = Net()
    model.backbone.c1 = Wrapper(model.backbone.c1, name)
    wrapped = Wrapper(Wrapper(model, name), "module")
    expected = plain_hooks(model.backbone.c1, [name], lambda: model(images()))[name]
    for path in ("backbone.c1.relu", f"module.{name}.backbone.c1.{name}.relu"):
        close(captured(FeatureTap(wrapped, [path]), lambda: wrapped(images()))[path], expected, 0.0)


def test_a_path_written_with_prefixes_finds_the_bare_model():
    model = Net()
    path = "module._orig_mod.backbone.c1"
    expected = plain_hooks(model, ["backbone.c1"], lambda: model(images()))["backbone.c1"]
    close(captured(FeatureTap(model, [path]), lambda: model(images()))[path], expected, 0.0)


class HasModule(nn.Module):
    """A user's own attribute is called like a wrapper's."""

    def __init__(self):
        super().__init__()
        self.module = Net().backbone
        self.neck = nn.Conv2d(8, 3, 1).double()

    def forward(self, x):
        return self.neck(self.module(x))


@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel], ids=["bare", "averaged"])
@pytest.mark.parametrize("path", ["module", "module.c1", "neck"])
def test_an_attribute_called_module_is_the_users(wrap, path):
    wrapped = wrap(HasModule())
    model = wrapped.module if isinstance(wrapped, AveragedModel) else wrapped
    expected = plain_hooks(model, [path], lambda: model(images()))[path]
    close(captured(FeatureTap(wrapped, [path]), lambda: wrapped(images()))[path], expected, 0.0)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("path", ["head", "{}.head"])
def test_an_attribute_called_like_a_wrapper_hides_no_path(name, path):
    model = nn.ModuleDict({"head": nn.Conv2d(3, 2, 1), name: nn.ModuleDict({"head": nn.ReLU()})})
    model.forward = lambda x: model[name]["head"](model["head"](x))
    wrapped, path = Wrapper(model.double(), "module"), path.format(name)
    expected = plain_hooks(model, [path], lambda: model(images()))[path]
    close(captured(FeatureTap(wrapped, [path]), lambda: wrapped(images()))[path], expected, 0.0)


@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel], ids=["bare", "averaged"])
def test_tied_modules_are_reached_by_both_names(wrap):
    model = Net()
    model.tied = model.backbone
    model = wrap(model)
    tap = FeatureTap(model, {"first": "backbone.c1", "second": "tied.c1"})
    first, second = captured(tap, lambda: model(images())).values()
    close(first, second, 0.0)


def test_a_path_written_with_prefixes_may_name_what_is_wrapped_of_a_tied_module():
    conv = nn.Conv2d(3, 4, 3).double()
    model = nn.Sequential(*[Wrapper(conv, "module")] * 2)
    assert resolve(model, "1.module", "layers")[0] is conv


# --- modules that are no longer what was tapped ---------------------------------------------------


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def add_lora(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["conv"], init_lora_weights=False))


def to_sync_batch_norm(model):
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def fuse(model):
    torch.ao.quantization.fuse_modules(model.eval().backbone.c1, [["conv", "norm"]], inplace=True)


def assign(model):
    model.backbone.c1.conv = nn.Conv2d(3, 4, 3, 2, 1).double()


def assign_around(model):
    model.backbone.c1 = Around(model.backbone.c1)


def assign_another_backbone(model):
    model.backbone = Net().backbone


def delete(model):
    del model.backbone.c1[2]


REPLACED = {
    "LoRA": (add_lora, "backbone.c1.conv", "peft's Conv2d in place of torch's Conv2d"),
    "LoRA, an input": (add_lora, "backbone.c1.conv:input", "peft's Conv2d"),
    "SyncBatchNorm": (to_sync_batch_norm, "backbone.c1.norm", "torch's SyncBatchNorm in place of"),
    "fused": (fuse, "backbone.c1.norm", "torch's Identity in place of torch's BatchNorm2d"),
    "another": (assign, "backbone.c1.conv", "torch's Conv2d in place of torch's Conv2d"),
    "one around it": (assign_around, "backbone.c1", "tests's Around"),
    "another model around it": (assign_another_backbone, "backbone.c1", "torch's Sequential"),
    "none": (delete, "backbone.c1.relu", "nothing in place of torch's ReLU"),
}
REASONS = (
    "it was replaced or wrapped, as by LoRA, a conversion or a quantisation. Make the tap (or the "
    "distiller) after that."
)
each_replaced = pytest.mark.parametrize(
    ("replace", "path", "mention"),
    [
        pytest.param(*case, id=kind, marks=[pytest.mark.model_zoo] if "LoRA" in kind else [])
        for kind, case in REPLACED.items()
    ],
)


@each_replaced
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_module_that_was_replaced_is_an_error_that_says_so(replace, path, mention):
    model = Net()
    with FeatureTap(model, {"c": path}) as tap:
        model.eval()(images())
        tap.pop()
        replace(model)
        model.eval()(images())
        raises(RuntimeError, tap.pop, "layers['c']", mention, repr(path), REASONS)


@each_replaced
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_tap_made_after_that_captures_what_plain_hooks_see(replace, path, mention):
    model = Net()
    replace(model)
    model.eval()
    if replace is delete:
        raises(ValueError, lambda: FeatureTap(model, [path]), "'backbone.c2.relu'")
    elif ":" not in path:
        captures_what_plain_hooks_see(FeatureTap(model, [path]), model, lambda: model(images()))


@pytest.mark.model_zoo
def test_the_old_path_in_a_peft_model_is_an_error_with_the_new_one():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(), LoraConfig(target_modules=["conv"], init_lora_weights=False))
    new = "base_model.model.backbone.c1.conv"
    raises(ValueError, lambda: FeatureTap(model, ["backbone.c1.conv"]), f"(close: {new!r})")
    tap = FeatureTap(model, [new])
    features = captures_what_plain_hooks_see(tap, model, lambda: model(images()))
    assert features[new].requires_grad


def wrapped_by(name):
    def wrap(model):
        model.backbone.c1 = Wrapper(model.backbone.c1, name)

    return wrap


def put_around_the_backbone(model):
    model.backbone = nn.Sequential(model.backbone)


def parametrize(model):
    conv = model.backbone.c1.conv
    nn.utils.parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))


@pytest.mark.parametrize(
    "change", [*map(wrapped_by, WRAPPERS), put_around_the_backbone, parametrize]
)
def test_a_module_that_still_runs_as_itself_was_not_replaced(change):
    model = Net()
    expected = []
    model.backbone.c1.register_forward_hook(lambda *call: expected.append(call[-1].clone()))
    tap = FeatureTap(model, LEVELS)
    change(model)
    close(captured(tap, lambda: model(images()))["c1"], expected[0], 0.0)


@pytest.mark.parametrize(
    ("wrap", "path", "tapped"),
    [
        (None, "", ""),
        (None, "backbone.c1:input[0]", "backbone.c1"),
        ("around", "", "module"),
        ("around", "backbone.c1", "module.backbone.c1"),
        ("inside", "backbone.c1.relu", "backbone.c1.module.relu"),
        ("inside", "backbone.c1", "backbone.c1.module"),
    ],
)
def test_a_module_in_its_place_is_found_without_the_names_of_all(wrap, path, tapped, monkeypatch):
    """At each pop; they take a thousand times longer."""
    model = Net()
    if wrap == "inside":
        model.backbone.c1 = Wrapper(model.backbone.c1, "module")
    model = Wrapper(model, "module") if wrap == "around" else model
    module = model.get_submodule(tapped)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    require_in_place(model, path, "layers", module)


# --- models that were traced, exported or scripted ------------------------------------------------


def traced(model):
    return torch.jit.trace(model, images())


def exported(model):
    return torch.export.export(model, (images(),)).module()


def quantised(model):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    settings = get_default_qat_qconfig_mapping("fbgemm")
    return prepare_qat_fx(model.train().float(), settings, (images().float(),))


GRAPHS = {
    "symbolic_trace": (torch.fx.symbolic_trace, "backbone.c1", "such as 'backbone.c1.relu'."),
    "export": (exported, "backbone.c1.conv", "tap the model that this was made of."),
    "qat": (quantised, "backbone.c1", "such as 'backbone.c1.conv'."),
    "jit.trace": (traced, "backbone.c1.conv", "TopLevelTracedModule"),
    "jit.script": (torch.jit.script, "backbone.c1.conv", "RecursiveScriptModule"),
    "a scripted model itself": (torch.jit.script, "", "RecursiveScriptModule"),
}
quiet = pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:.*torch.jit.* is deprecated",
    "ignore:.*reduce_range:UserWarning",
)


@quiet
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside another"])
@pytest.mark.parametrize(("make", "path", "mention"), GRAPHS.values(), ids=GRAPHS)
def test_a_name_that_never_runs_is_an_error_at_once(make, path, mention, inside):
    model = make(Net().eval())
    if inside:
        model, path = Around(model), f"inner.{path}".rstrip(".")
        mention = mention.replace("'backbone", "'inner.backbone")
    raises(ValueError, lambda: FeatureTap(model, {"c": path}), "layers['c']", repr(path), mention)


@quiet
@pytest.mark.parametrize("path", ["", "backbone.c1.relu", "head"])
def test_what_a_traced_model_does_call_is_captured(path):
    model = torch.fx.symbolic_trace(Net())
    captures_what_plain_hooks_see(FeatureTap(model, [path]), model, lambda: model(images()))


@quiet
@pytest.mark.parametrize("make", [traced, exported])
def test_what_a_traced_or_exported_model_puts_out_is_captured(make):
    model = make(Net().eval())
    captures_what_plain_hooks_see(FeatureTap(model, [""]), model, lambda: model(images()))


def test_the_parts_of_an_unflattened_program_run():
    model = torch.export.unflatten(torch.export.export(Net().eval(), (images(),)))
    tap = FeatureTap(model, list(LEVELS.values()))
    captures_what_plain_hooks_see(tap, model, lambda: model(images()))


def test_a_tied_module_that_runs_beside_the_graph_is_captured():
    model = Net()
    model.graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    model.graph.unused = model.backbone.c1
    tap = FeatureTap(model, ["graph.unused"])
    captures_what_plain_hooks_see(tap, model, lambda: model(images()))


def test_a_tied_module_whose_first_name_is_a_graphs_is_captured():
    part = nn.Conv2d(3, 4, 3).double()
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    graph.unused = part
    model = nn.Sequential(graph, part)
    captures_what_plain_hooks_see(FeatureTap(model, ["1"]), model, lambda: model(images()))


def called(module, x):
    return module(x)


def test_a_module_that_a_graph_fetches_and_hands_on_is_captured():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(called, (graph.get_attr("part"), x)))
    model = torch.fx.GraphModule({"part": nn.Conv2d(3, 4, 3).double()}, graph)
    captures_what_plain_hooks_see(FeatureTap(model, ["part"]), model, lambda: model(images()))


def test_a_traced_copy_that_runs_in_place_of_the_model_is_named():
    model = Net()
    copied = torch.fx.symbolic_trace(model)
    with FeatureTap(model, LEVELS) as tap:
        copied(images())
        raises(RuntimeError, tap.pop, "got 0", "no traced or exported copy")


def test_an_argument_for_another_alias_is_told_those_there_are():
    text = "`calls` must name aliases of ['c1', 'c2'], got 'c9'."
    raises(ValueError, lambda: FeatureTap(Net(), LEVELS, calls={"c9": 2}), text)


def test_hooks_that_somebody_took_off_are_named():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        model.backbone.c1._forward_hooks.clear()
        model(images())
        raises(RuntimeError, tap.pop, "got 0: its hooks were taken off the model, make a new tap.")


# --- hooks of others that replace what a module hands on ------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_hook_added_after_the_tap_is_heard(count):
    model = Net().eval()
    layers = {"c1": "backbone.c1", "x": "backbone.c2:input"}
    taps = [FeatureTap(model, layers) for _ in range(count)]
    model.backbone.c1.register_forward_hook(lambda module, args, output: output + 1)
    model.backbone.c2.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    expected = model.backbone.c1(images())
    for tap in taps:
        features = captured(tap, lambda: model(images()))
        close(features["c1"], expected, 0.0)
        close(features["x"], 3 * expected, 0.0)


def test_a_hook_added_inside_the_block_is_heard_from_the_next_pop_on():
    model = Net().eval()
    with FeatureTap(model, {"c1": "backbone.c1"}) as tap:
        model.backbone.c1.register_forward_hook(lambda module, args, output: output + 1)
        model(images())
        tap.pop()
        model(images())
        close(tap.pop()["c1"], model.backbone.c1(images()), 0.0)


def test_a_hook_added_after_the_tap_is_heard_where_another_of_the_tap_was_taken_off():
    model = Net().eval()
    tap = FeatureTap(model, {"c1": "backbone.c1"})
    model._forward_pre_hooks.clear()
    model.backbone.c1.register_forward_hook(lambda module, args, output: output + 1)
    features = captured(tap, lambda: model(images()))
    close(features["c1"], model.backbone.c1(images()), 0.0)


def test_the_order_of_the_hooks_of_taps_stays():
    model = Net()
    first, second = FeatureTap(model, LEVELS), FeatureTap(model, LEVELS)
    before = list(model.backbone.c1._forward_hooks)
    for tap in (first, second, first):
        captured(tap, lambda: model(images()))
    assert list(model.backbone.c1._forward_hooks) == before


# --- selectors ------------------------------------------------------------------------------------


class Output(nn.Module):
    """Puts out whatever `make` makes of its features."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x, x.relu())


def model_output(first, second):
    from transformers.utils import ModelOutput

    return ModelOutput(first=first, second=second)


class NamedPair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


STRUCTURES = {
    "dict": (lambda a, b: {"first": a, "second": b}, "[second]", "'second'"),
    "integer keys": (lambda a, b: {3: a, 4: b}, "[4]", "4"),
    "tuple": (lambda a, b: (a, b), "[1]", "tuple of 2"),
    "from the end": (lambda a, b: [a, b], "[-1]", "list of 2"),
    "the first from the end": (lambda a, b: [b, a], "[-2]", "list of 2"),
    "nested": (lambda a, b: {"maps": (a, [b])}, "[maps][1][0]", "'maps'"),
    "named tuple": (NamedPair, "[second]", "NamedPair of 2"),
    "attribute": (Pair, "[second]", "Pair"),
    "model output": (model_output, "[second]", "'second'"),
}


@pytest.mark.parametrize(
    ("make", "selector", "mention"),
    [
        pytest.param(*case, id=kind, marks=[pytest.mark.model_zoo] if "model" in kind else [])
        for kind, case in STRUCTURES.items()
    ],
)
def test_a_structure_needs_a_selector_and_gives_what_it_selects(make, selector, mention):
    model = nn.Sequential(Output(make))
    with FeatureTap(model, ["0"]) as tap:
        raises(ValueError, lambda: model(images()), mention, "'0'", "0[KEY]")
    tap = FeatureTap(model, {"second": f"0{selector}"})
    close(captured(tap, lambda: model(images()))["second"], images().relu(), 0.0)


@pytest.mark.parametrize(
    ("kind", "selector", "mention"),
    [
        ("dict", "[third]", "['first', 'second']"),
        pytest.param("model output", "[third]", "['first', 'second']", marks=pytest.mark.model_zoo),
        ("tuple", "[2]", "tuple of 2"),
        ("tuple", "[-3]", "tuple of 2"),
        ("tuple", "[first]", "tuple of 2"),
        ("attribute", "[third]", "Pair"),
        ("nested", "[maps][1][1]", "list of 1"),
    ],
)
def test_a_selector_of_nothing_is_an_error_with_what_is_there(kind, selector, mention):
    model = nn.Sequential(Output(STRUCTURES[kind][0]))
    with FeatureTap(model, {"c": f"0{selector}"}):
        raises(ValueError, lambda: model(images()), "layers['c']", mention)


class TwoInputs(nn.Module):
    def forward(self, first, second=None):
        return first if second is None else first + second


class CallsTwoInputs(nn.Module):
    def __init__(self, by_name):
        super().__init__()
        self.inner = TwoInputs()
        self.by_name = by_name

    def forward(self, x):
        return self.inner(x, second=x + 1) if self.by_name else self.inner(x, x + 1)


@pytest.mark.parametrize(
    ("path", "by_name", "shift"),
    [("[0]", False, 0), ("[1]", False, 1), ("[0]", True, 0), ("[second]", True, 1)],
)
def test_inputs_are_taken_by_position_and_name(path, by_name, shift):
    model = CallsTwoInputs(by_name)
    tap = FeatureTap(model, {"x": f"inner:input{path}"})
    close(captured(tap, lambda: model(images()))["x"], images() + shift, 0.0)


def test_one_input_needs_no_selector_and_two_do():
    model = Net()
    tap = FeatureTap(model, {"x": "backbone:input"})
    close(captured(tap, lambda: model(images()))["x"], images(), 0.0)
    model = CallsTwoInputs(by_name=True)
    with FeatureTap(model, ["inner:input"]):
        raises(ValueError, lambda: model(images()), "'0'", "'second'")


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


class Checkpointed(Net):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, images):
        images = images.requires_grad_()
        return self.head(checkpoint(self.backbone, images, use_reentrant=self.use_reentrant))


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
            "`layers['c1']` must carry a gradient, got none from 'backbone.c1': parameters are "
            "frozen (leave this level out, here and in the loss), or it runs under `no_grad` or "
            "inside reentrant checkpointing (take `use_reentrant=False`); call a teacher under "
            "`torch.no_grad()`."
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


# --- the model stays as it is, and so do its copies -----------------------------------------------


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "AveragedModel": AveragedModel,
}
each_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


@each_copy
@pytest.mark.parametrize("armed", [True, False])
def test_a_copy_of_a_tapped_model_writes_nothing(make_copy, armed):
    model = Net()
    tap = FeatureTap(model, LEVELS | {"x": "backbone:input"})
    duplicate = None if armed else make_copy(model)
    with tap:
        duplicate = duplicate or make_copy(model)
        duplicate(images(seed=1))
        raises(RuntimeError, tap.pop, "got 0")
        model(images())
        assert tap.pop().keys() == tap.layers.keys()


@each_copy
def test_a_copy_of_a_tapped_model_can_be_tapped_itself(make_copy):
    model = Net()
    tap = FeatureTap(model, LEVELS)
    duplicate = make_copy(model)
    paths = {
        level: ("module." if make_copy is AveragedModel else "") + LEVELS[level] for level in LEVELS
    }
    expected = plain_hooks(duplicate, paths.values(), lambda: duplicate(images()))
    with tap:
        features = captured(FeatureTap(duplicate, LEVELS), lambda: duplicate(images()))
    for level, path in paths.items():
        close(features[level], expected[path], 0.0)


# Run where featkd cannot be imported: the models in the files put out what they put out here.
LOADING = """
import sys

import torch
from torch.utils.hooks import RemovableHandle


class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "featkd":
            raise ImportError(name)


sys.meta_path.insert(0, Refuses())
for file in sys.argv[1:]:
    model, image, expected = torch.load(file, weights_only=False)
    model = getattr(model, "module", model)
    hooks = {key for part in model.modules() for key in part._forward_pre_hooks}
    assert hooks and RemovableHandle.next_id > max(hooks), file
    # Under a number of ours it would be called with ours' options.
    calls = []
    model[1].register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-12)
    assert len(calls) == 1
assert "featkd" not in sys.modules
"""


def test_copies_and_saved_models_need_no_featkd(tmp_path):
    def build():
        parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)
        return nn.Sequential(*parts).double().eval()

    image = images()
    tapped, student = build(), build()
    layers = {"c": "1", "x": "1:input", "tokens": "2"}
    tap = FeatureTap(tapped, layers, convert={"tokens": PatchTokens(2)})
    loss = featkd.FeatureDistillationLoss(4, 4, hyperparameters=featkd.NORMALIZED)
    distiller = featkd.Distiller(student, build(), loss, {"c": "1"}, shared_input="1")
    saved = {
        "tapped": tapped,
        "copy": copy.deepcopy(tapped),
        "copy of a copy": copy.deepcopy(copy.deepcopy(tapped)),
        "pickled": pickle.loads(pickle.dumps(tapped)),
        "averaged": AveragedModel(tapped),
        "student": distiller.student,
        "EMA of the student": copy.deepcopy(distiller.student).eval().requires_grad_(False),
    }
    with tap, torch.no_grad():
        for name, model in saved.items():
            torch.save((model, image, model(image)), tmp_path / name)
    hidden = [sys.executable, "-W", "error", "-c", LOADING, *map(str, tmp_path.iterdir())]
    subprocess.run(hidden, check=True)
    del distiller
    gc.collect()
    assert hook_count(student) == 0


@pytest.mark.parametrize("with_kwargs", [True, False])
def test_the_hooks_of_others_go_with_a_copy(with_kwargs):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Doubling(with_kwargs))
    model[1].register_forward_pre_hook(model[1].double_input, with_kwargs=with_kwargs)
    tap = FeatureTap(model, {"c": "0", "x": "1:input"})
    duplicate = copy.deepcopy(model)
    close(duplicate(torch.ones(1, 3, 2, 2)), 2 * model[0](torch.ones(1, 3, 2, 2)), 0.0)
    assert hook_count(duplicate) == hook_count(model)
    del tap
    assert hook_count(model) == 1


class Doubling(nn.Module):
    def __init__(self, with_kwargs):
        super().__init__()
        self.with_kwargs = with_kwargs

    def double_input(self, module, args, kwargs=None):
        args = (2 * args[0],)
        return (args, kwargs) if self.with_kwargs else args

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "make_copy", [COPIES["deepcopy"], COPIES["pickle"]], ids=["deep", "pickle"]
)
def test_a_copy_of_a_tap_taps_the_copy_of_its_model(make_copy):
    model = Net()
    tap = FeatureTap(model, LEVELS, clone=False, calls={"c1": 2}, convert={"c2": doubled})
    other_model, other_tap = make_copy((model, tap))
    for name in ("layers", "clone", "calls", "convert"):
        assert getattr(other_tap, name) == getattr(tap, name)
    assert other_tap.model is other_model
    with tap, other_tap:
        other_model.backbone.c1(images())
        other_model(images())
        assert other_tap.pop().keys() == {"c1[0]", "c1[1]", "c2"}
        raises(RuntimeError, tap.pop, "got 0")


def test_the_state_dict_and_the_outputs_are_those_of_the_untapped_model():
    model = Net().eval()
    before, expected = snapshot(model), model(images())
    tap = FeatureTap(model, LEVELS)
    with tap:
        close(model(images()), expected, 0.0)
        assert unchanged(model, before)
    assert unchanged(model, before)
    assert not list(model.children())[2:]


def test_the_hooks_go_with_the_tap():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    assert hook_count(model) > 0
    del tap
    gc.collect()
    assert hook_count(model) == 0


def test_the_hooks_go_when_removed():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    tap.remove()
    assert hook_count(model) == 0
    tap.remove()
    with tap:
        model(images())
        raises(RuntimeError, tap.pop, "got 0")


def test_a_dropped_model_is_not_kept_alive_by_its_hooks():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    alive = weakref.ref(model)
    del model, tap
    gc.collect()
    assert alive() is None


# --- what a training script does to a model -------------------------------------------------------


def test_functional_call():
    model = Net()
    weights = {
        name: (2 * value).detach().requires_grad_() for name, value in model.named_parameters()
    }
    call = partial(torch.func.functional_call, model, weights, (images(),))
    features = captures_what_plain_hooks_see(FeatureTap(model, LEVELS), model, call)
    features["c1"].sum().backward()
    assert weights["backbone.c1.norm.weight"].grad.abs().sum() > 0


def test_channels_last_is_kept():
    model = Net().to(memory_format=torch.channels_last)
    batch = images().to(memory_format=torch.channels_last)
    tap = FeatureTap(model, LEVELS)
    features = captures_what_plain_hooks_see(tap, model, lambda: model(batch))
    assert features["c1"].is_contiguous(memory_format=torch.channels_last)


def test_autocast():
    model = Net().float()

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            model(images().float())

    tap = FeatureTap(model, ["backbone.c1.conv"])
    features = captures_what_plain_hooks_see(tap, model, call)
    assert features["backbone.c1.conv"].dtype == torch.bfloat16


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel(), dtype=weight.dtype))
        self.up = nn.Parameter(torch.randn(len(weight), 2, dtype=weight.dtype))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


@pytest.mark.parametrize("tap_first", [True, False])
def test_low_rank_parametrization(tap_first):
    model = Net()
    model.requires_grad_(False)
    tap = FeatureTap(model, LEVELS) if tap_first else None
    for stage in model.backbone:
        low_rank = LowRank(stage.conv.weight)
        nn.utils.parametrize.register_parametrization(stage.conv, "weight", low_rank)
    tap = tap or FeatureTap(model, LEVELS)
    features = captures_what_plain_hooks_see(tap, model, lambda: model(images()))
    features["c1"].sum().backward()
    assert model.backbone.c1.conv.parametrizations.weight[0].up.grad.abs().sum() > 0


def test_a_replica_of_data_parallel_is_an_error_that_names_the_alternative():
    model = Net()
    tap = FeatureTap(model, LEVELS)
    replica = model._replicate_for_data_parallel()
    with tap:
        said = (
            "`model` must not run as replicas of nn.DataParallel, which share one tap between "
            "threads"
        )
        raises(RuntimeError, lambda: replica(images()), said, "a Net: use DistributedDataParallel")


def test_a_replica_of_a_part_is_an_error_too():
    model = Net()
    tap = FeatureTap(model, {"c1": "backbone.c1.relu"})
    replica = model.backbone.c1.relu._replicate_for_data_parallel()
    with tap:
        raises(RuntimeError, lambda: replica(images()), "a ReLU", "DataParallel")


@pytest.mark.parametrize("one_model", [False, True], ids=["two models", "one model"])
def test_two_threads_with_a_tap_each(one_model):
    models = [Net().eval()] * 2 if one_model else [Net().eval(), Net().eval()]
    expected = [model.backbone.c1(images(seed=i)) for i, model in enumerate(models)]
    together = threading.Barrier(2, timeout=20)
    results = {}

    def run(index):
        try:
            tap = FeatureTap(models[index], LEVELS)
            for _ in range(3):
                with tap:
                    together.wait()
                    models[index](images(seed=index))
                    together.wait()
                    results[index] = tap.pop()["c1"]
        except RuntimeError as error:
            results[index] = error
            together.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert isinstance(results[index], torch.Tensor), results[index]
        close(results[index], expected[index], 0.0)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_ten_thousand_pops_leave_no_tensor_and_no_other_object():
    model = Net().eval().backbone.c1
    tap = FeatureTap(model, {"x": ":input", "c1": "conv"})
    batch = images(1)[..., :2, :2]
    captured(tap, lambda: model(batch))
    tensors, objects = live_tensors(), len(gc.get_objects())
    for _ in range(10_000):
        captured(tap, lambda: model(batch))
    assert live_tensors() == tensors
    assert len(gc.get_objects()) - objects < 100


def test_a_hundred_taps_leave_no_hook():
    model = Net()
    for _ in range(100):
        captured(FeatureTap(model, LEVELS), lambda: model(images()))
    gc.collect()
    assert hook_count(model) == 0


# --- torch.export ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "removed",
    [pytest.param(False, marks=pytest.mark.one_graph), True],
    ids=["tapped", "after removal"],
)
def test_the_exported_model_is_that_of_an_untapped_one(removed):
    model = Net()
    tap = FeatureTap(model, LEVELS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        features = captured(tap, lambda: model(images()))
        features["c2"].square().mean().backward()
        optimizer.step()
    untapped = Net()
    untapped.load_state_dict(model.state_dict())
    if removed:
        tap.remove()
    programs = [torch.export.export(net.eval(), (images(),)) for net in (model, untapped)]
    assert str(programs[0]) == str(programs[1])
    close(programs[0].module()(images()), untapped(images()), 0.0)


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
