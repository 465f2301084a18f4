"""The imitation's mask, drawn, and its loss by hand."""

import copy

import pytest
import torch

import featkd
from benchmarks.study.methods import FineGrainedImitation
from benchmarks.study.tests.methods.helpers import (
    STUDENT,
    TEACHER,
    close,
    features,
    make,
    see_boxes,
    value,
)
from examples.detection.detectors import build


def imitated(*boxes, sizes, psi=0.5, stride=8, ratios=(1.0,)):
    """The positions of one map of 4 x 5 that count, drawn."""
    shape = (1, 1, 4, 5)
    positions = torch.eye(20).view(20, 1, 1, 4, 5)
    loss = FineGrainedImitation(
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
        FineGrainedImitation(
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
    student, teacher = (build("retinanet", role, 5, 64) for role in ("student", "teacher"))
    options = {"weight": 1.0, "anchor_sizes": {"c3": (10, 14)}}
    loss = FineGrainedImitation({"c3": 8}, {"c3": 48}, **options)
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
