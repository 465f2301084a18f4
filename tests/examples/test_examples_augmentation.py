"""What the main job changes at random in its pictures: right boxes, the same when resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.detection.__main__ import main, parse
from examples.detection.augmentation import augmented, drawn, rescaled
from examples.detection.models import new_detector
from tests.helpers.coco_folder import write_coco

BATCH = (
    [torch.rand(3, 120, 160), torch.rand(3, 160, 120)],
    [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}] * 2,
)


def test_a_mirrored_image_has_its_boxes_mirrored_and_is_the_same_when_resumed() -> None:
    images, targets = augmented(BATCH, drawn(0, 5, 2), 1.0, None)
    assert torch.equal(images[0], BATCH[0][0].flip(-1))
    assert targets[0]["boxes"].tolist() == [[100.0, 8.0, 152.0, 60.0]]
    assert BATCH[1][0]["boxes"].tolist() == [[8.0, 8.0, 60.0, 60.0]]
    pictures = ([torch.rand(3, 4, 4) for _ in range(64)], [BATCH[1][0]] * 64)
    first, again, later = (
        augmented(pictures, drawn(3, step, 64), 0.5, None)[0] for step in (7, 7, 8)
    )
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, later))
    assert 16 < sum(map(torch.equal, first, pictures[0])) < 48


def test_a_small_picture_has_the_mean_beside_it_and_boxes_of_its_size() -> None:
    # From 0 at the left edge to 1 at the right one.
    ramp = ((torch.arange(160) + 0.5) / 160).expand(3, 120, -1)
    image, target = rescaled(ramp, BATCH[1][0], 0.5, [0.9, 0.9])
    assert image.shape == (3, 120, 160)
    assert target["boxes"].tolist() == [[4, 4, 30, 30]]
    assert type(target["boxes"]) is type(image) is torch.Tensor
    expected = ((torch.arange(80) + 0.5) / 80).expand(3, 60, -1)
    assert torch.allclose(image[:, :60, 1:79], expected[:, :, 1:79], atol=1e-6)
    for part in (image[:, 60:], image[:, :, 80:]):
        assert torch.equal(part, torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand_as(part))


def test_a_large_picture_is_a_part_and_keeps_the_boxes_that_it_shows() -> None:
    boxes = torch.tensor([[8.0, 8, 60, 60], [40, 25, 70, 35], [0, 0, 40.5, 30], [100, 30, 160, 90]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3, 4]), "image_id": 7}
    # Half of each side, from the left 40 of 0 to 80, and from the top 30 of 0 to 60.
    image, target = rescaled(BATCH[0][0], target, 2.0, [0.5, 0.5])
    assert torch.equal(image, BATCH[0][0][:, 30:90, 40:120])
    assert target["boxes"].tolist() == [[0, 0, 20, 30], [0, 0, 30, 5], [60, 0, 80, 60]]
    assert target["labels"].tolist() == [1, 2, 4]
    assert target["image_id"] == 7


@pytest.mark.parametrize("factor", [0.001, 0.3, 1.0, 3.0, 1000.0])
def test_a_scaled_picture_may_lose_all_boxes_and_never_leaves_its_own_edge(factor: float) -> None:
    for place in ([0.0, 0.0], [1 - 1e-7, 1 - 1e-7]):
        image, target = rescaled(BATCH[0][1], BATCH[1][1], factor, place)
        assert min(image.shape[1:]) >= 1
        assert len(target["boxes"]) == len(target["labels"])
        assert target["boxes"].shape[1] == 4
        assert (target["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
    assert len(target["boxes"]) == (factor in (0.3, 1.0))
    if factor == 1:
        assert torch.equal(image, BATCH[0][1])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    _, target = rescaled(BATCH[0][1], empty, factor, [0.5, 0.5])
    assert target["boxes"].shape == (0, 4)
    # A detector takes what is left, nothing included.
    assert new_detector(parse([]), "student", 4)([image], [target])["classification"] >= 0


def test_scales_are_of_the_range_asked_for_and_the_same_when_resumed() -> None:
    pictures = ([torch.rand(3, 40, 40) for _ in range(64)], [BATCH[1][0]] * 64)
    first, again, later = (
        augmented(pictures, drawn(3, step, 64), 0.0, (1.0, 4.0))[0] for step in (7, 7, 8)
    )
    assert all(map(torch.equal, first, again))
    widths = [image.shape[-1] for image in first]
    assert widths != [image.shape[-1] for image in later]
    assert 10 <= min(widths) < 13
    assert 35 < max(widths) <= 40
    # Mirrored are the same ones as without it.
    draws = drawn(3, 7, 64)
    flips = torch.rand(64, generator=torch.Generator().manual_seed(3 * 1_000_003 + 7))
    assert torch.equal(draws[:, 0], flips)


@pytest.mark.slow
def test_scaled_pictures_train_and_a_broken_run_goes_on_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.detection import training

    torch.set_num_threads(1)
    images, annotations = write_coco(tmp_path / "data", 12)
    data = ["--data", "coco", "--images", images, "--annotations", annotations, "--size", "64"]
    steps = ["--teacher-epochs", 0.4, "--epochs", 1, "--batch-size", 2, "--evaluations", 1]
    jitter = ["--scale-jitter", 0.1, 4, "--checkpoint-every", 1, "--seed", 3]
    command = [*map(str, [*data, *steps, *jitter, "--output"])]
    main([*command, str(tmp_path / "whole")])
    taken = []

    def interrupted(*rest: Any) -> Any:
        taken.append(1)
        if len(taken) == 9:
            raise KeyboardInterrupt
        return backward(*rest)

    backward = training.backward
    monkeypatch.setattr(training, "backward", interrupted)
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "broken")])
    monkeypatch.undo()
    main([*command, str(tmp_path / "broken"), "--resume"])
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken")
    ]
    losses = [{name: run["losses"] for name, run in each["runs"].items()} for each in results]
    # Of 10 pictures in batches of 2.
    assert {name: len(each) for name, each in losses[0].items()} == {
        "teacher": 2,
        "plain": 5,
        "distilled": 5,
    }
    assert losses[0] == losses[1]
