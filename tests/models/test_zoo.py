"""Any two models, any wrapper: one test for every cell of COMPATIBILITY.md.

`test_<column>[<model>]` is a cell; `python -m tests.helpers.matrix` makes the table.
The first columns go through whole detectors, with targets, in training mode; the wrappers are
tried on the part of a model that holds the taps: a detector's backbone, or all of a small model,
of which the backbone is compiled and exported.
"""

import copy
import math
import pickle
import traceback
from datetime import timedelta
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import featkd
from featkd import STANDARDIZED, Distiller, FeatureDistillationLoss, FeatureTap, Hyperparameters
from tests.helpers.models import hook_count, snapshot, unchanged, watch
from tests.helpers.zoo import CROSS_PAIRS, IMAGES, NOT_SUPPORTED, ZOO

pytestmark = pytest.mark.slow

ALL_TERMS = Hyperparameters(alpha=1.0, beta=1.0, gamma=1.0, temperature=0.5, normalize=True)


def pytest_generate_tests(metafunc):
    """One model after the other, each built once; what two processes find meanwhile comes last."""
    if "name" in metafunc.fixturenames:
        column = metafunc.function.__name__.removeprefix("test_")
        names = [name for name in ZOO if (name, column) not in NOT_SUPPORTED]
        scope = "function" if "errors" in metafunc.fixturenames else "module"
        metafunc.parametrize("name", names, scope=scope)


@pytest.fixture(scope="session", autouse=True)
def what_the_matrix_says_beside_the_results(record_testsuite_property):
    for package in ("torch", "torchvision", "transformers", "timm"):
        record_testsuite_property(package, version(package))
    for (name, column), reason in NOT_SUPPORTED.items():
        record_testsuite_property(f"test_{column}[{name}]", reason)


@pytest.fixture(scope="session", autouse=True)
def two_processes(request, tmp_path_factory):
    """Work beside the other tests, if theirs are among them, and leave their errors in a folder."""
    if not any("errors" in getattr(item, "fixturenames", ()) for item in request.session.items):
        return None
    folder = tmp_path_factory.mktemp("zoo")
    return folder, mp.start_processes(
        run, (folder,), WORLD, join=False, daemon=True, start_method="spawn"
    )


@pytest.fixture(scope="module")
def entry(name):
    return ZOO[name]


@pytest.fixture(scope="module")
def model(entry):
    """Copied by each test, never changed."""
    return build(entry)


@pytest.fixture
def body(entry, model):
    return copy.deepcopy(model.get_submodule(entry.body))


def build(entry):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = entry.build().train()
    # As in a trained model, the running statistics are those of the features.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.get_submodule(entry.body)(IMAGES)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model


# --- whole detectors in training ------------------------------------------------------------------


def with_other_weights(model):
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.01)
    return teacher


def channels_of(entry, model):
    """Level -> channels of the feature map; the model stays as it is."""
    body = model.get_submodule(entry.body)
    layers = entry.layers_of(entry.body)
    with torch.no_grad(), FeatureTap(body, layers, convert=entry.convert) as tap:
        body.eval()(IMAGES)
        body.train()
        return {level: feature.shape[1] for level, feature in tap.pop().items()}


def loss_of(ours, theirs, hyperparameters):
    return FeatureDistillationLoss(ours, theirs, hyperparameters=hyperparameters, inter_channels=8)


def training_step(distiller, entries, *args, **kwargs):
    """One step on the distillation losses alone, watched by plain hooks."""
    sides = (distiller.student, distiller.teacher)
    teacher = snapshot(distiller.teacher)
    optimizer = torch.optim.SGD(distiller.parameters(), 1e-3)
    captured = []
    handle = distiller.loss.register_forward_pre_hook(lambda loss, args: captured.extend(args))
    with (
        watch(sides[0], entries[0].layers.values()) as ours,
        watch(sides[1], entries[1].layers.values()) as theirs,
    ):
        _, losses = distiller(*args, **kwargs)
    handle.remove()
    before = first_weight(distiller.student)[1].detach().clone()
    sum(losses.values()).backward()
    optimizer.step()
    expected = [
        {
            level: entry.convert.get(level, nn.Identity())(hooked[entry.layers[level]])
            for level in captured[0]
        }
        for entry, hooked in zip(entries, (ours, theirs), strict=True)
    ]
    return SimpleNamespace(
        distiller=distiller,
        entry=entries[0],
        captured=captured,
        expected=expected,
        teacher=teacher,
        moved=not torch.equal(first_weight(distiller.student)[1], before),
    )


def first_weight(model):
    """The stem's, which lies before every tap."""
    return next((name, p) for name, p in model.named_parameters() if p.dim() == 4)


@pytest.fixture(scope="module")
def distilled(entry, model):
    channels = channels_of(entry, model)
    distiller = Distiller(
        copy.deepcopy(model),
        with_other_weights(model),
        loss_of(channels, channels, ALL_TERMS),
        entry.layers,
        shared_input=entry.shared_input,
        convert=entry.convert,
    )
    return training_step(distiller, (entry, entry), *entry.inputs, **entry.options)


def captured_what_plain_hooks_saw(step):
    for ours, expected in zip(step.captured, step.expected, strict=True):
        same(ours, expected)


def gradient_reached_the_stem_and_the_adapters(step):
    _, stem = first_weight(step.distiller.student)
    trained = [value for value in step.distiller.loss.parameters() if value.requires_grad]
    assert trained
    for parameter in (stem, *trained):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def teacher_did_not_move(step):
    teacher = step.distiller.teacher
    assert step.moved
    assert unchanged(teacher, step.teacher)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def same(ours, expected):
    assert ours.keys() == expected.keys()
    for level, feature in expected.items():
        assert feature.any()
        assert torch.equal(ours[level], feature), level


def test_values(distilled):
    captured_what_plain_hooks_saw(distilled)


def test_gradient(distilled, entry):
    gradient_reached_the_stem_and_the_adapters(distilled)
    for name, parameter in distilled.distiller.student.named_parameters():
        assert name.startswith(entry.body) or parameter.grad is None, name


def test_teacher(distilled):
    teacher_did_not_move(distilled)


def test_state_dict(entry, model, distilled):
    student = copy.deepcopy(model).eval()
    before, hooks = snapshot(student), hook_count(student)
    distiller = Distiller(
        student, distilled.distiller.teacher, nn.Identity(), entry.layers, convert=entry.convert
    )
    tap = FeatureTap(student, entry.layers)
    assert hook_count(student) > hooks
    with tap:
        student.get_submodule(entry.body)(IMAGES)
    assert unchanged(student, before)
    del distiller, tap
    assert hook_count(student) == hooks


def test_export(entry, model, distilled):
    student, untapped = distilled.distiller.student, copy.deepcopy(model)
    untapped.load_state_dict(student.state_dict())
    parts = [each.get_submodule(entry.part).eval() for each in (student, untapped)]
    assert hook_count(parts[0]) > hook_count(parts[1])
    programs = [torch.export.export(each, (IMAGES,)) for each in parts]
    assert str(programs[0]) == str(programs[1])
    outputs = [tree_leaves(run(IMAGES)) for run in (programs[0].module(), parts[1])]
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_match_layers(entry, model):
    """What is proposed is what is expected, and a tap of it captures what a plain hook sees."""
    matched = featkd.match_layers(model, model, entry.inputs[0])
    proposed = {**matched.pairs, **matched.others}
    found = {level: ours for level, (ours, _) in proposed.items() if level <= "c5" or level > "p"}
    assert {level: layer.path for level, layer in found.items()} == {
        **entry.stages,
        **entry.pyramid,
    }
    assert matched.pairs.keys() == (entry.pyramid or dict.fromkeys(proposed, 0)).keys()
    for level, layer in found.items():
        stride = 2 ** int(level[1:])
        assert layer.stride == stride
        assert layer.shape[2:] == tuple(math.ceil(side / stride) for side in entry.size)
    layers = {level: ours.path for level, (ours, _) in proposed.items()}
    model = copy.deepcopy(model).eval()
    convert = matched.select(*proposed).convert
    student_convert = {level: pair[0] for level, pair in convert.items()}
    with (
        watch(model, layers.values()) as expected,
        FeatureTap(model, layers, convert=student_convert) as tap,
        torch.no_grad(),
    ):
        model(entry.inputs[0])
        for level, feature in tap.pop().items():
            seen = student_convert.get(level, nn.Identity())(expected[layers[level]])
            assert torch.equal(feature, seen)
            assert tuple(feature.shape[1:]) == proposed[level][0].shape[1:]


# --- wrappers -------------------------------------------------------------------------------------


def outcome(body, output, features):
    """The features, and the gradient of their squares and of the output's."""
    values = [
        value for value in (*tree_leaves(output), *features.values()) if differentiable(value)
    ]
    total = sum(value.float().square().mean() for value in values)
    total.backward()
    return SimpleNamespace(
        features={level: feature.detach() for level, feature in features.items()},
        gradients={name: value.grad for name, value in body.named_parameters()},
    )


def differentiable(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


def tapped(tap, call, body=None):
    with tap:
        output = call(IMAGES)
        return outcome(body or tap.model, output, tap.pop())


def untapped(module, layers):
    """What plain hooks find on a copy that nobody wraps."""
    module = copy.deepcopy(module)
    with watch(module, layers.values()) as features:
        output = module(IMAGES)
    return outcome(module, output, {level: features[path] for level, path in layers.items()})


@pytest.fixture(scope="module")
def plain(entry, model):
    return untapped(model.get_submodule(entry.body), entry.layers_of(entry.body))


def agree(ours, expected, tolerance=1e-5):
    """To rounding, up to the largest value of each."""
    for a, b in ((ours.features, expected.features), (ours.gradients, expected.gradients)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            near(a[name], value, tolerance, name)


def near(ours, expected, tolerance, name):
    if expected is None:
        assert ours is None or not ours.any(), name
    else:
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max(), name


class OneStage(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, *args):
        return self.stage(*args)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_before_the_tap(entry, model):
    """A model of the last tapped stage alone, as the whole compiles for seconds."""
    *_, path = entry.layers_of(entry.part).values()
    part, calls = copy.deepcopy(model.get_submodule(entry.part)).eval(), []
    stage = OneStage(part.get_submodule(path))
    handle = stage.stage.register_forward_pre_hook(lambda stage, args: calls.append(args))
    with torch.no_grad():
        part(IMAGES)
    handle.remove()
    (args,) = calls
    compiled = torch.compile(stage, backend="eager")
    compiled(*args)
    with FeatureTap(stage, ["stage"]) as tap:
        compiled(*args)
        with pytest.raises(RuntimeError, match=r"got 0: .*torch.compiler.reset"):
            tap.pop()


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_after_the_tap(entry, model):
    part, layers = copy.deepcopy(model.get_submodule(entry.part)), entry.layers_of(entry.part)
    tap = FeatureTap(part, layers)
    agree(tapped(tap, torch.compile(part, backend="eager")), untapped(part, layers))


class Checkpointed(nn.Module):
    def __init__(self, body, use_reentrant):
        super().__init__()
        self.body = body
        self.use_reentrant = use_reentrant

    def forward(self, images):
        # Reentrant checkpointing wants an input that requires a gradient.
        images = images.clone().requires_grad_()
        return checkpoint(self.body, images, use_reentrant=self.use_reentrant)


def test_checkpoint(entry, body, plain):
    layers = {
        level: f"body.{path}".rstrip(".") for level, path in entry.layers_of(entry.body).items()
    }
    tap = FeatureTap(Checkpointed(body, use_reentrant=False), layers)
    agree(tapped(tap, tap.model, body), plain)
    with pytest.raises(RuntimeError, match="got 0"):
        tap.pop()  # what the backward ran again
    tap = FeatureTap(Checkpointed(body, use_reentrant=True), layers)
    with tap:
        tap.model(IMAGES)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            tap.pop()


def test_functional_call(entry, body, plain):
    tap = FeatureTap(body, entry.layers_of(entry.body))
    other = copy.deepcopy(body)
    weights = dict(other.named_parameters())
    with torch.no_grad():
        for value in body.parameters():
            value.zero_()
    agree(tapped(tap, lambda images: functional_call(body, weights, (images,)), other), plain)


def test_ema(entry, body, plain):
    tap = FeatureTap(body, entry.layers_of(entry.body))
    average = AveragedModel(body)
    average.update_parameters(body)
    captures_nothing_of(average, tap)
    agree(tapped(tap, body), plain)


def captures_nothing_of(twin, tap):
    with tap, torch.no_grad():
        twin(IMAGES)
        with pytest.raises(RuntimeError, match="got 0"):
            tap.pop()


def copy_is_on_its_own(make_copy, entry, body, plain):
    tap = FeatureTap(body, entry.layers_of(entry.body))
    twin = make_copy(body)
    assert unchanged(twin, snapshot(body))
    captures_nothing_of(twin, tap)
    agree(tapped(FeatureTap(twin, tap.layers), twin), plain)


def test_deepcopy(entry, body, plain):
    copy_is_on_its_own(copy.deepcopy, entry, body, plain)


def test_pickle(entry, body, plain):
    def pickled(body):
        return pickle.loads(pickle.dumps(body))

    copy_is_on_its_own(pickled, entry, body, plain)


def distiller_of_body(entry, body, channels):
    """As a training script would have it, on the part that holds the taps."""
    return Distiller(
        body,
        with_other_weights(body),
        loss_of(channels, channels, STANDARDIZED),
        entry.layers_of(entry.body),
        convert=entry.convert,
    )


@pytest.fixture(scope="module")
def channels(entry, model):
    return channels_of(entry, model)


def of_body(entry):
    return SimpleNamespace(layers=entry.layers_of(entry.body), convert=entry.convert)


def differs(step, plain):
    """What the student captured is not what it is in float32, with its own weights."""
    for level, feature in plain.features.items():
        expected = step.entry.convert.get(level, nn.Identity())(feature)
        assert not torch.equal(step.captured[0][level].float(), expected)


def test_amp(entry, body, channels, plain):
    distiller = distiller_of_body(entry, body, channels)
    with torch.autocast("cpu", torch.bfloat16):
        step = training_step(distiller, [of_body(entry)] * 2, IMAGES)
    differs(step, plain)
    captured_what_plain_hooks_saw(step)
    gradient_reached_the_stem_and_the_adapters(step)
    teacher_did_not_move(step)


def test_channels_last(entry, body, channels):
    distiller = distiller_of_body(entry, body, channels).to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    step = training_step(distiller, [of_body(entry)] * 2, images)
    captured_what_plain_hooks_saw(step)
    for level, feature in step.expected[0].items():
        assert step.captured[0][level].stride() == feature.stride()
    gradient_reached_the_stem_and_the_adapters(step)
    teacher_did_not_move(step)


class FakeQuantized(nn.Module):
    """To 8 bits, with a straight-through gradient."""

    def forward(self, weight):
        scale = weight.detach().abs().max().clamp_min(1e-8).item() / 127
        return torch.fake_quantize_per_tensor_affine(weight, scale, 0, -127, 127)


def test_qat(entry, body, channels, plain):
    distiller = distiller_of_body(entry, body, channels)
    for module in body.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", FakeQuantized())
    step = training_step(distiller, [of_body(entry)] * 2, IMAGES)
    captured_what_plain_hooks_saw(step)
    differs(step, plain)
    gradient_reached_the_stem_and_the_adapters(step)


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()))
        self.up = nn.Parameter(torch.randn(len(weight), 2) / 10)

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def test_lora(entry, body, channels):
    distiller = distiller_of_body(entry, body, channels)
    body.requires_grad_(False)
    name, weight = first_weight(body)
    stem = body.get_submodule(name.rpartition(".")[0])
    parametrize.register_parametrization(stem, "weight", LowRank(weight))
    step = training_step(distiller, [of_body(entry)] * 2, IMAGES)
    captured_what_plain_hooks_saw(step)
    trained = {name for name, value in body.named_parameters() if value.grad is not None}
    lora = stem.parametrizations.weight[0]
    assert len(trained) == 2
    assert lora.up.grad.any()
    assert lora.down.grad.any()


def test_what_is_not_supported_fails_without_a_tap_too():
    assert [column for _, column in NOT_SUPPORTED] == ["pickle"]
    for name, _ in NOT_SUPPORTED:
        with pytest.raises(AttributeError, match="local object"):
            pickle.dumps(build(ZOO[name]))


# --- pairs of two families ------------------------------------------------------------------------


def forward_of_images(teacher, images, **_):
    return teacher(images)


@pytest.mark.parametrize(("theirs", "ours"), CROSS_PAIRS, ids=map(" to ".join, CROSS_PAIRS))
def test_cross_pair(theirs, ours):
    entries = student_entry, teacher_entry = ZOO[ours], ZOO[theirs]
    student, teacher = map(build, entries)
    levels = [level for level in student_entry.layers if level in teacher_entry.layers]
    assert levels
    channels = [
        {level: all_channels[level] for level in levels}
        for all_channels in map(channels_of, entries, (student, teacher))
    ]
    shared = None
    if student_entry.shared_input:
        shared = (student_entry.shared_input, teacher_entry.shared_input or "")
    distiller = Distiller(
        student,
        teacher,
        loss_of(*channels, ALL_TERMS),
        {level: tuple(entry.layers[level] for entry in entries) for level in levels},
        shared_input=shared,
        teacher_forward=None if shared else forward_of_images,
        convert={
            level: tuple(entry.convert.get(level) for entry in entries)
            for level in levels
            if any(level in entry.convert for entry in entries)
        },
    )
    step = training_step(distiller, entries, *student_entry.inputs, **student_entry.options)
    captured_what_plain_hooks_saw(step)
    gradient_reached_the_stem_and_the_adapters(step)
    teacher_did_not_move(step)


# --- two processes --------------------------------------------------------------------------------

WORLD = 2


def ddp(distiller, layers):
    # A detector's backbone alone leaves parameters out that its head would use.
    return DistributedDataParallel(distiller, find_unused_parameters=True)


def fsdp2(distiller, layers):
    mesh = init_device_mesh("cpu", (WORLD,))
    stages = [distiller.student.get_submodule(path) for path in layers.values()]
    for part in (*stages, distiller.loss, distiller):
        fully_shard(part, mesh=mesh)
    return distiller


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}


def gradients(distiller, images):
    """Of the student's output and the distillation losses, under the unwrapped names."""
    output, losses = distiller(images)
    values = [value for value in tree_leaves(output) if differentiable(value)]
    (sum(value.square().mean() for value in values) + sum(losses.values())).backward()
    return {
        name.removeprefix("module."): whole(value.grad)
        for name, value in distiller.named_parameters()
        if value.grad is not None
    }


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def mean_over_ranks(values):
    for value in values.values():
        dist.all_reduce(value)
        value /= WORLD
    return values


def try_wrappers(name, wrappers):
    """What each raised, if it did; each rank has images of its own, the reference wraps nothing."""
    entry = ZOO[name]
    model = build(entry)
    channels = channels_of(entry, model)
    distiller = distiller_of_body(entry, model.get_submodule(entry.body), channels)
    images = IMAGES.roll(dist.get_rank(), dims=-1)
    copies = [copy.deepcopy(distiller) for _ in wrappers]
    expected = mean_over_ranks(gradients(distiller, images))
    assert {parameter.split(".")[0] for parameter in expected} == {"student", "loss"}
    errors = {}
    for wrapper, each in zip(wrappers, copies, strict=True):
        try:
            found = gradients(WRAPPERS[wrapper](each, entry.layers_of(entry.body)), images)
            for parameter, value in expected.items():
                near(found[parameter], value, 1e-4, parameter)
        except Exception:
            errors[name, wrapper] = traceback.format_exc()
    return errors


def run(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=2),
    )
    errors = {}
    for name in ZOO:
        errors |= try_wrappers(name, [w for w in WRAPPERS if (name, w) not in NOT_SUPPORTED])
    torch.save(errors, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def errors(two_processes):
    """Of each rank: every model and wrapper that failed, and what was raised."""
    folder, processes = two_processes
    while not processes.join():
        pass
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def passed_on_every_rank(errors, name, wrapper):
    for rank in errors:
        assert (name, wrapper) not in rank, rank[name, wrapper]


def test_ddp(errors, name):
    passed_on_every_rank(errors, name, "ddp")


def test_fsdp2(errors, name):
    passed_on_every_rank(errors, name, "fsdp2")
