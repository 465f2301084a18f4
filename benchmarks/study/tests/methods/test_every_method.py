"""What holds for every method: one entry, its levels, its gradients, its place in a distiller."""

import copy

import pytest
import torch
from torch import nn

import featkd
from benchmarks.study.methods import METHODS
from benchmarks.study.tests.methods.helpers import STUDENT, TEACHER, close, features, make, value
from examples.detection.detectors import build

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_a_loss_has_one_entry_in_proportion_to_its_weight(name):
    loss, half = make(name), make(name, weight=0.5)
    half.load_state_dict(loss.state_dict())
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    entry = value(loss, ours, theirs, name=name)
    assert entry.shape == ()
    assert entry > 0
    close(value(half, ours, theirs), entry / 2)


@every_method
def test_the_levels_are_added_up(name):
    loss = make(name)
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    alone = []
    for level in "ab":
        one = make(name, {level: STUDENT[level]}, {level: TEACHER[level]})
        one.adapters[level] = loss.adapters[level]
        alone.append(value(one, {level: ours[level]}, {level: theirs[level]}))
    # The released overhaul halves a level for each that lies behind it.
    factor = 0.5 if name == "overhaul" else 1.0
    close(value(loss, ours, theirs), factor * alone[0] + alone[1])


@every_method
def test_the_gradient_reaches_the_student_and_every_adapter_alone(name):
    loss = make(name)
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    for x in (*ours.values(), *theirs.values()):
        x.requires_grad_()
    value(loss, ours, theirs).backward()
    for trained in (*ours.values(), *loss.parameters()):
        assert trained.grad.isfinite().all()
        assert trained.grad.any()
    assert all(x.grad is None for x in theirs.values())


@every_method
def test_the_student_s_gradient_is_that_of_the_value(name):
    loss = make(name)
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    value(loss, ours, theirs)
    if name == "overhaul":
        loss.margins.eval()  # they stay from here

    def of(a, b):
        return value(loss, {"a": a, "b": b}, theirs)

    assert torch.autograd.gradcheck(of, [x.requires_grad_() for x in ours.values()])


@every_method
def test_equal_features_cost_nothing_and_pull_nowhere(name):
    # Equal channel counts: the adapters start as the identity.
    loss = make(name, TEACHER, TEACHER)
    theirs = features(TEACHER)
    if name == "overhaul":
        loss.adapters = nn.ModuleDict({level: nn.Identity() for level in TEACHER})
        # What lies under the margin is compared with it.
        theirs = {level: x.relu() for level, x in theirs.items()}
    ours = {level: x.clone().requires_grad_() for level, x in theirs.items()}
    entry = value(loss, ours, theirs)
    entry.backward()
    close(entry, 0.0, 1e-12)
    for x in ours.values():
        close(x.grad, torch.zeros_like(x), 1e-8)


@every_method
def test_half_precision_features_are_computed_in_float32(name):
    loss = make(name, dtype=None)
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    half = [{level: x.half() * 300 for level, x in side.items()} for side in (ours, theirs)]
    single = [{level: x.float() for level, x in side.items()} for side in half]
    expected = value(copy.deepcopy(loss), *single)
    with torch.autocast("cpu", torch.bfloat16):
        entry = value(loss, *half)
    assert entry.dtype == torch.float32
    assert entry.isfinite()
    torch.testing.assert_close(entry, expected, rtol=1e-5, atol=0)


@every_method
def test_levels_or_shapes_that_do_not_fit_are_named(name):
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    with pytest.raises(ValueError, match="`teacher_channels` must have the levels"):
        make(name, STUDENT, {"a": 5})
    with pytest.raises(ValueError, match="`student_features` must have the levels"):
        value(make(name), {"a": ours["a"]}, theirs)
    with pytest.raises(ValueError, match="`teacher` must have the shape"):
        value(make(name), ours, theirs | {"a": theirs["b"]})
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\)"):
        value(make(name), ours | {"a": ours["a"][..., :5]}, theirs)


@every_method
def test_a_distiller_takes_it(name):
    teacher, student = (build("fcos", role, 5, 64) for role in ("teacher", "student"))
    layers = {level: f"backbone.body.layer{i}" for i, level in enumerate(("c3", "c4"), 2)}
    channels = {"c3": 8, "c4": 16}, {"c3": 48, "c4": 96}
    options = {"anchor_sizes": {"c3": (10, 14), "c4": (20, 28)}} if name == "fgfi" else {}
    loss = METHODS[name](*channels, weight=0.1, **options)
    if name == "fgfi":
        loss.watch(student)
    distiller = featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")
    target = {"boxes": torch.tensor([[8.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    losses, distillation = distiller.train()([torch.rand(3, 64, 64)] * 2, [target] * 2)
    sum((losses | distillation).values()).backward()
    assert list(distillation) == [name]
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["cwd", "pkd"])
def test_equal_channels_are_compared_without_an_adapter(name):
    assert {path for path, _ in make(name).named_parameters()} == {
        "adapters.a.weight",
        "adapters.a.bias",
    }
