"""The methods that the paper compares with: values by hand, gradients, and one step of each."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import featkd
from benchmarks.study.methods import baseline as baselines
from examples import detectors

SIZES = {"a": (8.0,), "b": (16.0, 24.0)}
METHODS = {
    "fitnets": baselines.FitNets,
    "at": baselines.AttentionTransfer,
    "fgfi": baselines.FineGrainedImitation,
    "overhaul": baselines.FeatureOverhaul,
    "cwd": partial(baselines.ChannelWiseDistillation, temperature=2.0),
    "pkd": baselines.PearsonDistillation,
}
every_method = pytest.mark.parametrize("name", METHODS)
STUDENT, TEACHER = {"a": 3, "b": 4}, {"a": 5, "b": 4}
IMAGE = (32, 48)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual, expected, tolerance=1e-10):
    """Equal up to `tolerance` times the larger of 1 and the largest expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    size = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=tolerance * size)


def make(name, student=STUDENT, teacher=TEACHER, weight=1.0, dtype=torch.float64):
    options = {"anchor_sizes": {k: SIZES[k] for k in student}} if name == "fgfi" else {}
    return METHODS[name](student, teacher, weight=weight, **options).to(dtype)


def see_boxes(loss, *boxes, image_size=IMAGE):
    """As if a step of the student had shown them; other losses need none."""
    if isinstance(loss, baselines.FineGrainedImitation):
        loss.seen.boxes = [torch.as_tensor(each).view(-1, 4) for each in boxes]
        loss.seen.image_size = image_size
    return loss


def features(channels, seed=0, strides=(8, 16)):
    return {
        level: normal(2, count, IMAGE[0] // stride, IMAGE[1] // stride, seed=seed)
        for (level, count), stride in zip(channels.items(), strides, strict=True)
    }


def value(loss, student, teacher, *boxes, name=None):
    boxes = boxes or ([4.0, 4.0, 30.0, 20.0], [0.0, 8.0, 20.0, 24.0])
    ((entry, total),) = see_boxes(loss, *boxes)(student, teacher).items()
    assert name in (None, entry)
    return total


def at_one_level(loss, student, teacher):
    """The loss of two maps, given as nested lists, without the adapter."""
    loss.adapters["a"] = nn.Identity()
    return value(
        loss,
        {"a": torch.tensor(student, dtype=torch.float64)},
        {"a": torch.tensor(teacher, dtype=torch.float64)},
    )


# --- all of them ----------------------------------------------------------------------------------


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
    teacher, student = (detectors.build("fcos", role, 5, 64) for role in ("teacher", "student"))
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


# --- each -----------------------------------------------------------------------------------------


def test_a_hint_is_half_the_mean_square_to_the_regressed_student():
    loss = make("fitnets", {"a": 1}, {"a": 1})
    with torch.no_grad():
        loss.adapters["a"].weight.fill_(2.0)
        loss.adapters["a"].bias.fill_(1.0)
    # 2 * (1, 2) + 1 = (3, 5), from (1, 1): 4 and 16.
    close(value(loss, {"a": torch.tensor([[[[1.0, 2]]]])}, {"a": torch.ones(1, 1, 1, 2)}), 5.0)


def test_an_attention_map_is_the_sum_of_squares_at_length_one():
    # (3, 4) / 5 from (1, 0): (-0.4, 0.8). The second image's maps are proportional.
    student = [[[[1, 2]], [[1, 0]], [[1, 0]]], [[[1, 1]], [[1, 0]], [[0, 1]]]]
    teacher = [[[[2, 0]]], [[[-3, 3]]]]
    loss = make("at", {"a": 3}, {"a": 1})
    close(at_one_level(loss, student, teacher), math.sqrt(0.8) / 2 / 2)


def test_channel_wise_distillation_is_the_teacher_s_divergence_from_the_student():
    # tau = 2: softmax(0, ln 3) = (1/4, 3/4); the teacher's is (1/2, 1/2).
    # KL = ln(2) / 2 + ln(2/3) / 2 = ln(4/3) / 2, times 4, in one of two channels of one of two
    # images.
    loss = make("cwd", {"a": 2}, {"a": 2})
    student = [[[[0, 2 * math.log(3)]], [[1, 5]]], [[[1, 2]], [[3, 4]]]]
    teacher = [[[[7, 7]], [[0, 4]]], [[[1, 2]], [[3, 4]]]]
    close(at_one_level(loss, student, teacher), math.log(4 / 3) / 2)


@pytest.mark.parametrize("name", ["cwd", "pkd"])
def test_equal_channels_are_compared_without_an_adapter(name):
    assert {path for path, _ in make(name).named_parameters()} == {
        "adapters.a.weight",
        "adapters.a.bias",
    }


def test_pkd_is_one_minus_the_correlation_over_batch_and_positions():
    # (-1, 0, 1) and (-1, 1, 0) correlate at 1/2 whatever their scale, in the second channel at -1.
    loss = make("pkd", {"a": 2}, {"a": 2})
    student, teacher = [[1, 2, 3], [0, 1, 2]], [[10, 30, 20], [5, 4, 3]]
    along = [[[row] for row in side] for side in (student, teacher)]
    close(at_one_level(loss, [along[0]], [along[1]]), (0.5 + 2) / 2, 1e-7)
    across = [torch.tensor(side).T[..., None, None].tolist() for side in (student, teacher)]
    close(at_one_level(loss, *across), (0.5 + 2) / 2, 1e-7)


def test_pkd_is_finite_where_a_channel_is_constant():
    ours, theirs = features(TEACHER), features(TEACHER, seed=1)
    for side in (ours, theirs):
        side["a"][:, 0] = 3.0
    ours["a"].requires_grad_()
    value(make("pkd", TEACHER, TEACHER), ours, theirs).backward()
    assert ours["a"].grad.isfinite().all()


# --- the imitation's mask -------------------------------------------------------------------------


def imitated(*boxes, sizes, psi=0.5, stride=8, ratios=(1.0,)):
    """The positions of one map of 4 x 5 that count, drawn."""
    shape = (1, 1, 4, 5)
    positions = torch.eye(20).view(20, 1, 1, 4, 5)
    loss = baselines.FineGrainedImitation(
        {"a": 1}, {"a": 1}, weight=1.0, anchor_sizes={"a": sizes}, aspect_ratios=ratios, psi=psi
    )
    drawn = ""
    for position in positions:
        see_boxes(loss, boxes, image_size=(4 * stride, 5 * stride))
        drawn += "X" if loss({"a": position}, {"a": torch.zeros(shape)})["fgfi"] > 0 else "."
    return [drawn[row : row + 5] for row in range(0, 20, 5)]


def test_the_mask_has_the_anchors_over_half_of_the_box_s_largest_iou():
    # Anchors of 8 x 8 at multiples of 8. IoU with the first two of row 1: 32 / 96, and no others.
    assert imitated([0.0, 4, 8, 12], sizes=(8,)) == [".....", "XX...", ".....", "....."]
    # With those of row 1: 0, 16 / 144, 64 / 96, 16 / 144; a sixth of the largest, not a half.
    box = [10.0, 4.0, 22.0, 12.0]
    assert imitated(box, sizes=(8,)) == [".....", "..X..", ".....", "....."]
    assert imitated(box, sizes=(8,), psi=0.16) == [".....", ".XXX.", ".....", "....."]


def test_the_threshold_itself_is_out():
    box = [0.0, 4.0, 8.0, 12.0]
    assert imitated(box, sizes=(8,), psi=1.0) == ["....."] * 4


def test_the_mask_unites_the_anchors_of_a_position():
    # A 16 x 16 at (1, 1) is the box; its four neighbours meet it at 128 / 384, diagonal ones and
    # 8 x 8 less.
    box = [0.0, 0.0, 16.0, 16.0]
    plus = [".X...", "XXX..", ".X...", "....."]
    assert imitated(box, sizes=(8, 16), psi=0.3) == plus
    assert imitated(box, sizes=(8, 16)) == [".....", ".X...", ".....", "....."]


def test_the_mask_unites_the_boxes_each_by_its_own_largest_iou():
    # The small box's best is 16 / 64 at (3, 4), under half of the other's 1.
    boxes = [4.0, 4.0, 12.0, 12.0], [30.0, 22.0, 34.0, 26.0]
    assert imitated(*boxes, sizes=(8,)) == [".....", ".X...", ".....", "....X"]
    assert imitated(sizes=(8,)) == ["....."] * 4
    assert imitated([90.0, 90.0, 99.0, 99.0], sizes=(8,)) == ["....."] * 4


def test_aspect_ratios_are_heights_over_widths():
    # At ratio 4 an anchor of 8 is 4 wide and 16 high: exactly the box at (2, 3), a third of it a
    # row off, nothing of it a column off.
    box = [22.0, 8.0, 26.0, 24.0]
    column = [".....", "...X.", "...X.", "...X."]
    assert imitated(box, sizes=(8,), ratios=(4.0,), psi=0.3) == column


def test_the_stride_is_the_image_s_size_over_the_map_s():
    box = [12.0, 12.0, 20.0, 20.0]
    assert imitated(box, sizes=(8,), stride=16) == [".....", ".X...", ".....", "....."]


def test_imitation_is_half_the_square_at_a_position_averaged_over_the_mask():
    # Positions (1, 1) and (3, 4) of two images count; squares of 3 channels: 3 * 4 and 3 * 16.
    loss = see_boxes(
        baselines.FineGrainedImitation(
            {"a": 3}, {"a": 3}, weight=1.0, anchor_sizes={"a": (8,)}, aspect_ratios=(1.0,)
        ),
        [4.0, 4.0, 12.0, 12.0],
        [28.0, 20.0, 36.0, 28.0],
        image_size=(32, 40),
    )
    student = torch.full((2, 3, 4, 5), 100.0)
    student[0, :, 1, 1], student[1, :, 3, 4] = 2.0, -4.0
    close(loss({"a": student}, {"a": torch.zeros(2, 3, 4, 5)})["fgfi"], (12 + 48) / 2 / 2)


def test_imitation_adapts_with_the_neighbours():
    loss = make("fgfi", {"a": 3}, {"a": 5})
    ours, theirs = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(1, 5, 4, 5)
    see_boxes(loss, [14.0, 14.0, 18.0, 18.0], image_size=(32, 40))
    loss({"a": ours}, {"a": theirs})["fgfi"].backward()
    reached = ours.grad.abs().sum((0, 1)) > 0
    assert reached.nonzero().tolist() == [[i, j] for i in (1, 2, 3) for j in (1, 2, 3)]


def test_imitation_without_a_box_is_a_zero_with_a_gradient():
    ours, theirs = features(STUDENT), features(TEACHER, seed=1)
    loss = make("fgfi")
    entry = value(loss, ours, theirs, [], [])
    entry.backward()
    assert entry == 0
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


def test_imitation_takes_the_boxes_of_each_step_from_the_detector_as_resized():
    student, teacher = (
        detectors.build("retinanet", role, 5, 64) for role in ("student", "teacher")
    )
    options = {"weight": 1.0, "anchor_sizes": {"c3": (10, 14)}}
    loss = baselines.FineGrainedImitation({"c3": 8}, {"c3": 48}, **options)
    handle = loss.watch(student)
    layers = {"c3": "backbone.body.layer2"}
    distiller = featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")
    # 32 x 40 becomes 64 x 80, and is padded to 64 x 96.
    images = [torch.rand(3, 32, 40), torch.rand(3, 32, 40)]
    boxes = [torch.tensor([[2.0, 3.0, 20.0, 12.0]]), torch.tensor([[0.0, 0.0, 9.0, 9.0]])]
    targets = [{"boxes": each, "labels": torch.tensor([1])} for each in boxes]
    captured = {}
    forward = loss.forward

    def noted(*sides):
        captured["boxes"], captured["size"] = list(loss.seen.boxes), loss.seen.image_size
        captured["sides"] = sides
        return forward(*sides)

    loss.forward = noted
    _, losses = distiller(images, targets)
    assert captured["size"] == (64, 96)
    for seen, given in zip(captured["boxes"], boxes, strict=True):
        torch.testing.assert_close(seen, 2 * given)

    loss.forward = forward
    with pytest.raises(RuntimeError, match=r"`seen\.boxes` must be set"):
        loss(*captured["sides"])
    see_boxes(loss, *(2 * each for each in boxes), image_size=(64, 96))
    torch.testing.assert_close(loss(*captured["sides"]), losses)

    # A validation shows none; a copy, such as a weight average, and a removed hook nothing.
    student(images, targets)
    with torch.no_grad():
        student.eval()(images)
    assert loss.seen.boxes is None
    copy.deepcopy(student).train()(images, targets)
    handle.remove()
    student.train()(images, targets)
    assert loss.seen.boxes is None


def test_boxes_of_another_batch_are_refused():
    loss = see_boxes(make("fgfi"), [0.0, 0, 9, 9])
    with pytest.raises(ValueError, match="of 2 images, got 1"):
        loss(features(STUDENT), features(TEACHER))


# --- the overhaul's margin and place --------------------------------------------------------------


def test_the_partial_distance_leaves_out_a_student_under_a_negative_target():
    # Margin -0.5. Teacher, student -> counted:
    #   -1, -2 -> 0;  -1, 1 -> 1.5^2;  -1, -0.25 -> 0.25^2;  -0.25, -0.5 -> 0;  -0.25, 0 -> 0.25^2;
    #    2, -1 -> 3^2;  2, 4 -> 2^2;  0, -3 -> 0
    margins = {"a": torch.tensor([-0.5])}
    loss = baselines.FeatureOverhaul({"a": 1}, {"a": 1}, weight=1.0, margins=margins)
    teacher = [[[[-1, -1, -1, -0.25, -0.25, 2, 2, 0]]]]
    student = [[[[-2, 1, -0.25, -0.5, 0, -1, 4, -3]]]]
    expected = 2.25 + 0.0625 + 0.0625 + 9 + 4
    close(at_one_level(loss, student, teacher), expected)
    # The mean over images of sums.
    close(at_one_level(loss, student * 3, teacher * 3), expected)


def test_the_margin_is_the_mean_of_the_negative_responses_so_far():
    margin = baselines.Margin(3, None)
    first = torch.tensor([[-1.0, 2, 0], [-4, 5, 1]])[..., None, None]
    close(margin(first).flatten(), [-2.5, 0, 0])
    close(margin(torch.full((1, 3, 1, 2), -4.0)).flatten(), [-13 / 4, -4, -4])
    close(margin.eval()(torch.full((1, 3, 1, 2), -9.0)).flatten(), [-13 / 4, -4, -4])


def test_given_margins_stay_and_are_saved():
    margins = {"a": torch.tensor([-0.5, -1, -1, -2, -3]), "b": -torch.ones(4)}
    make_one = partial(baselines.FeatureOverhaul, STUDENT, TEACHER, weight=1.0)
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
    close(baselines.margin_of_norm(norm), [*expected, -3.0, -2.0], 1e-4)


@pytest.mark.parametrize(("block", "depth"), [(BasicBlock, 1), (Bottleneck, 2)])
def test_a_stage_s_last_relu_moves_and_nothing_else(block, depth):
    net = ResNet(block, [depth] * 4, num_classes=3)
    moved = copy.deepcopy(net)
    for stage in (moved.layer1, moved.layer2):
        baselines.move_last_relu(stage)
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
    student, teacher = (detectors.build("fcos", role, 5, 64) for role in ("student", "teacher"))
    for model in (student, teacher):
        baselines.move_last_relu(model.backbone.body.layer2)
    loss = baselines.FeatureOverhaul({"c3": 8}, {"c3": 48}, weight=1.0)
    layers = {"c3": "backbone.body.layer2.0"}
    distiller = featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")
    target = {"boxes": torch.tensor([[8.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    _, losses = distiller([torch.rand(3, 64, 64)] * 2, [target] * 2)
    assert losses["overhaul"] > 0
    assert (loss.margins["c3"](torch.zeros(1, 48, 1, 1)) < 0).all()
