"""The hooks of a tap: beside those of others, in copies, and in what training does to a model."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import featkd
from featkd import FeatureTap, PatchTokens
from tests.helpers.models import (
    LEVELS,
    Net,
    by_torch_save,
    hook_count,
    images,
    plain_hooks,
    raises,
    snapshot,
    unchanged,
)
from tests.helpers.tapped import LowRank, captured, captures_what_plain_hooks_see, doubled
from tests.helpers.tensors import close

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


# --- the model stays as it is, and so do its copies -----------------------------------------------


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
    loss = featkd.FeatureDistillationLoss(4, 4, hyperparameters=featkd.STANDARDIZED)
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
