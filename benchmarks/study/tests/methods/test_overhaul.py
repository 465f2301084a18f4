"""The overhaul's margin and distance by hand, and its place ahead of a ReLU."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import featkd
from benchmarks.study.methods.overhaul import (
    FeatureOverhaul,
    Margin,
    margin_of_norm,
    move_last_relu,
)
from benchmarks.study.tests.methods.helpers import (
    STUDENT,
    TEACHER,
    at_one_level,
    close,
    features,
    make,
    normal,
    value,
)
from examples.detection.detectors import build


def test_the_partial_distance_leaves_out_a_student_under_a_negative_target():
    # Margin -0.5. Teacher, student -> counted:
    #   -1, -2 -> 0;  -1, 1 -> 1.5^2;  -1, -0.25 -> 0.25^2;  -0.25, -0.5 -> 0;  -0.25, 0 -> 0.25^2;
    #    2, -1 -> 3^2;  2, 4 -> 2^2;  0, -3 -> 0
    margins = {"a": torch.tensor([-0.5])}
    loss = FeatureOverhaul({"a": 1}, {"a": 1}, weight=1.0, margins=margins)
    teacher = [[[[-1, -1, -1, -0.25, -0.25, 2, 2, 0]]]]
    student = [[[[-2, 1, -0.25, -0.5, 0, -1, 4, -3]]]]
    expected = 2.25 + 0.0625 + 0.0625 + 9 + 4
    close(at_one_level(loss, student, teacher), expected)
    # The mean over images of sums.
    close(at_one_level(loss, student * 3, teacher * 3), expected)


def test_the_margin_is_the_mean_of_the_negative_responses_so_far():
    margin = Margin(3, None)
    first = torch.tensor([[-1.0, 2, 0], [-4, 5, 1]])[..., None, None]
    close(margin(first).flatten(), [-2.5, 0, 0])
    close(margin(torch.full((1, 3, 1, 2), -4.0)).flatten(), [-13 / 4, -4, -4])
    close(margin.eval()(torch.full((1, 3, 1, 2), -9.0)).flatten(), [-13 / 4, -4, -4])


def test_given_margins_stay_and_are_saved():
    margins = {"a": torch.tensor([-0.5, -1, -1, -2, -3]), "b": -torch.ones(4)}
    make_one = partial(FeatureOverhaul, STUDENT, TEACHER, weight=1.0)
    loss = make_one(margins=margins)
    loss({k: x.float() for k, x in features(STUDENT).items()}, features(TEACHER, seed=1))
    other = make_one(margins={level: x * 0 for level, x in margins.items()})
    other.load_state_dict(loss.state_dict())
    for one in (loss, other):
        close(one.margins["a"](torch.zeros(1, 5, 1, 1)).flatten(), margins["a"])


def test_the_overhaul_normalises_the_regressed_student():
    loss = make("overhaul")
    names = ["0.weight", "1.weight", "1.bias"]  # the convolution has no bias
    assert [name for name, _ in loss.adapters["a"].named_parameters()] == names
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    scaled = {level: 1000 * x + 5 for level, x in ours.items()}
    entry = value(copy.deepcopy(loss), ours, theirs)
    torch.testing.assert_close(value(loss, scaled, theirs), entry, rtol=1e-3, atol=0)


def test_a_norm_s_margin_is_the_mean_of_its_gaussian_s_negative_part():
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -0.7, 4.0, -2.0]))
    x = torch.linspace(-20, 0, 2_000_001, dtype=torch.float64)
    expected = []
    for mean, std in ((0.0, 1.0), (1.0, 2.0), (-0.7, 0.5)):
        density = torch.exp(-(((x - mean) / std) ** 2) / 2)
        expected.append(float((x * density).sum() / density.sum()))
    assert expected[0] == pytest.approx(-math.sqrt(2 / math.pi), abs=1e-4)
    # Four deviations above 0 three are taken; without a deviation it is the mean.
    close(margin_of_norm(norm), [*expected, -3.0, -2.0], 1e-4)


@pytest.mark.parametrize(("block", "depth"), [(BasicBlock, 1), (Bottleneck, 2)])
def test_a_stage_s_last_relu_moves_and_nothing_else(block, depth):
    net = ResNet(block, [depth] * 4, num_classes=3)
    moved = copy.deepcopy(net)
    for stage in (moved.layer1, moved.layer2):
        move_last_relu(stage)
    assert moved.state_dict().keys() == net.state_dict().keys()
    images = normal(2, 3, 32, 32, dtype=torch.float32)
    with (
        featkd.FeatureTap(net, {"c3": "layer2"}) as after,
        featkd.FeatureTap(moved, {"c3": f"layer2.{depth - 1}"}) as before,
    ):
        outputs = net(images), moved(images)
        behind, ahead = after.pop()["c3"], before.pop()["c3"]
    assert torch.equal(*outputs)
    assert (ahead < 0).any()
    assert torch.equal(ahead.relu(), behind)
    outputs[0].sum().backward()
    outputs[1].sum().backward()
    for ours, theirs in zip(moved.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_overhaul_distils_ahead_of_the_relu_of_the_examples_resnet():
    student, teacher = (build("fcos", role, 5, 64) for role in ("student", "teacher"))
    for model in (student, teacher):
        move_last_relu(model.backbone.body.layer2)
    loss = FeatureOverhaul({"c3": 8}, {"c3": 48}, weight=1.0)
    layers = {"c3": "backbone.body.layer2.0"}
    distiller = featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")
    target = {"boxes": torch.tensor([[8.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    _, losses = distiller([torch.rand(3, 64, 64)] * 2, [target] * 2)
    assert losses["overhaul"] > 0
    assert (loss.margins["c3"](torch.zeros(1, 48, 1, 1)) < 0).all()
