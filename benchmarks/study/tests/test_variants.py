"""What the library has no argument for, on cases worked by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import featkd
from benchmarks.study.methods.fine_grained_imitation import imitation_mask
from benchmarks.study.settings import NORMALIZED, settings_of
from benchmarks.study.train import ANCHOR_SIZES
from benchmarks.study.variants import WEIGHTS, calibrate, featkd_loss, near, standard

CHANNELS = {"c3": 3}, {"c3": 5}
SETTINGS = settings_of(NORMALIZED)


def features(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"c3": torch.randn(2, count, 4, 6, generator=generator)} for count in (3, 5)]


def masked(**settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return featkd_loss(*CHANNELS, 10, **SETTINGS | settings)


def test_without_a_variant_the_loss_is_the_library_s() -> None:
    torch.manual_seed(0)
    loss = featkd.FeatureDistillationLoss(*CHANNELS, hyperparameters=NORMALIZED)
    assert masked()(*features()) == loss(*features())


def test_live_masks_have_the_same_value_and_another_gradient() -> None:
    gradients = []
    for settings in ({}, {"masks": "live"}):
        student, teacher = features()
        student["c3"].requires_grad_()
        value = masked(**settings)(student, teacher)["loss_attention_masked"]
        value.backward()
        gradients.append((value.item(), student["c3"].grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    assert not torch.allclose(gradients[0][1], gradients[1][1], rtol=0.01)


def test_a_temperature_in_units_of_the_spread_ignores_the_features_scale() -> None:
    student, teacher = features()
    larger = [{"c3": 100 * side["c3"]} for side in (student, teacher)]
    loss = masked(masks="spread", temperature=2.0)
    torch.testing.assert_close(loss(*larger), loss(student, teacher))
    maps = featkd.spatial_attention(student["c3"]), torch.ones(2, 5)
    assert torch.allclose(standard(maps[0]).flatten(1).std(1), torch.ones(2))
    assert torch.equal(standard(maps[1]), maps[1])


def test_masks_of_centred_attention_do_not_see_what_all_positions_have() -> None:
    student, teacher = (side["c3"] for side in features())
    offset = torch.rand(2, teacher.shape[1], 1, 1)
    shifted = student + 1, teacher + offset, teacher - offset
    centred = [x - x.mean((2, 3), keepdim=True) for x in (student, teacher, teacher)]
    loss, plain = (
        masked(**settings).attention_masked["c3"] for settings in ({"masks": "centred"}, {})
    )
    torch.testing.assert_close(loss._masks(*shifted, None), plain._masks(*centred, None))


def test_a_mask_of_true_boxes_takes_the_positions_inside_equally() -> None:
    loss = featkd_loss(*CHANNELS, 10, **settings_of(featkd.STANDARDIZED), masks="boxes")
    student = nn.Module()
    student.transform = nn.Identity()
    loss.watch(student)
    pixels, box = torch.zeros(2, 3, 8, 12), torch.tensor([[2.0, 0.0, 6.0, 2.0]])
    batch = ImageList(pixels, [(8, 12)] * 2), [{"boxes": box}, {"boxes": box[:0]}]
    student.transform(batch)
    ours, theirs = (side["c3"] for side in features())
    (module,) = loss.attention_masked.values()
    mask, channels = module._masks(ours, ours, theirs, None)
    # Of 4 x 6 positions, 2 pixels apart: the first row's second and third.
    assert mask[0].flatten().tolist() == [0, 12, 12] + [0] * 21
    assert not mask[1].any()
    assert channels is None


def test_in_the_teacher_s_units_its_channels_count_alike_and_the_student_s_scale_matters() -> None:
    factors = torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0])[:, None, None]
    loss = featkd_loss(*CHANNELS, 10, **settings_of(featkd.STANDARDIZED), unit="teacher")
    (module,) = loss.attention_masked.values()
    module.adapter = nn.Identity()
    teacher = features()[1]["c3"]
    half = (teacher - 0.5 * teacher.std((0, 2, 3), keepdim=True), 0.125)
    for student, expected in ((teacher, 0.0), half):
        found = module._of_pair(student * factors, teacher * factors)
        assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert module._of_pair(2 * half[0], teacher) > 0.2
    left = torch.zeros(2, 4, 6)
    left[..., :2] = 3.0
    module._masks = lambda *_: (left, None)
    wrong_at_right = torch.where(left[:, None] > 0, teacher, teacher + 7)
    assert module._of_pair(wrong_at_right, teacher) == 0
    assert module._of_pair(half[0], teacher).item() == pytest.approx(0.125, rel=1e-5)


@pytest.mark.parametrize(("level", "stride"), list(enumerate((4, 8, 16))))
def test_near_a_box_is_where_fine_grained_imitation_looks(level: int, stride: int) -> None:
    boxes = torch.tensor([[20.0, 8.0, 34.0, 26.0], [3.0, 40.0, 20.0, 47.0]])
    height, width = 48 // stride, 96 // stride
    generator = AnchorGenerator((ANCHOR_SIZES[level],), ((0.5, 1.0, 2.0),))
    generator.set_cell_anchors(torch.float32, torch.device("cpu"))
    (anchors,) = generator.grid_anchors([(height, width)], [(stride, stride)])
    expected = imitation_mask(anchors.view(height, width, -1, 4), boxes, 0.5)
    assert torch.equal(near(boxes, (48, 96), height, width), expected)
    assert 0 < expected.sum() < expected.numel()
    assert not near(boxes[:0], (48, 96), height, width).any()


def test_a_term_by_element_is_over_the_root_of_the_elements() -> None:
    by_element = masked(unit="element", normalize=False)
    whole = masked(normalize=False)
    by_element.levels["c3"].load_state_dict(
        {key.replace(".c3.", ".features."): value for key, value in whole.state_dict().items()}
    )
    found, printed = by_element(*features()), whole(*features())
    root = math.sqrt(5 * 4 * 6)
    torch.testing.assert_close(found, {name: value / root for name, value in printed.items()})


def test_a_schedule_warms_up_or_decays_and_survives_a_checkpoint() -> None:
    plain = masked()(*features())["loss_attention_masked"].item()
    factors = {}
    for schedule in ("warm-up", "decay", "cosine", "early end"):
        loss = masked(schedule=schedule)
        steps = []
        for _ in range(10):
            fresh = masked(schedule=schedule)
            fresh.load_state_dict(loss.state_dict())
            steps.append(loss(*features())["loss_attention_masked"].item() / plain)
            again = fresh(*features())["loss_attention_masked"].item() / plain
            assert again == pytest.approx(steps[-1])
        factors[schedule] = steps
    assert factors["warm-up"] == pytest.approx([0, 0.5] + [1] * 8)
    assert factors["decay"][0] == pytest.approx(1)
    assert factors["decay"][5] == pytest.approx(0.5)
    assert factors["decay"] == sorted(factors["decay"], reverse=True)
    assert factors["cosine"] == pytest.approx([0.1 + 0.9 * factor for factor in factors["decay"]])
    assert factors["early end"] == pytest.approx([1] * 9 + [0], abs=1e-6)


def test_a_level_counts_as_its_share_of_the_positions() -> None:
    channels = {"c3": 3, "c4": 3}
    settings = SETTINGS | {"levels": "positions"}
    loss = featkd_loss(channels, channels, 10, **settings)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {
            "c3": torch.randn(2, 3, 4, 6, generator=generator),
            "c4": torch.randn(2, 3, 2, 3, generator=generator),
        }
        for _ in range(2)
    )
    fine, coarse = (
        loss.levels[level](student[level], teacher[level])["loss_attention_masked"]
        for level in channels
    )
    found = loss(student, teacher)["loss_attention_masked"]
    torch.testing.assert_close(found, 1.6 * fine + 0.4 * coarse)


def test_weights_by_gradient_give_each_term_its_share_of_the_detector_s() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.nn.Conv2d(3, channels, 3) for channels in (4, 6))
    loss = featkd.FeatureDistillationLoss({"c": 4}, {"c": 6}, hyperparameters=featkd.ONE_STAGE)

    def scalar(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        return model(image).square().mean()

    distiller = featkd.Distiller(
        student, teacher, loss, {"c": ""}, student_forward=scalar, teacher_forward=scalar
    )
    batch = [torch.randn(2, 3, 12, 12)]
    calibrate(distiller, batch, ratio=1.5)
    shares = {term.name: term.gradient_ratio for term in distiller.report(*batch).terms}
    assert shares == pytest.approx(dict.fromkeys(WEIGHTS.values(), 0.5), rel=1e-4)
    before = loss.hyperparameters
    calibrate(distiller, batch, total=3.0)
    assert distiller.report(*batch).distillation.gradient_ratio == pytest.approx(3.0, rel=1e-4)
    after = loss.hyperparameters
    assert after.alpha / before.alpha == pytest.approx(after.beta / before.beta)
    assert after.gamma / before.gamma == pytest.approx(after.beta / before.beta)


def test_a_tied_relation_is_the_teacher_s_on_the_adapted_student() -> None:
    loss = masked(beta=0.0, gamma=1.0, reduction="mean", relation="tied")
    (module,) = loss.non_local.values()
    adapter, relation = module.student_relation
    assert relation is module.teacher_relation
    student, teacher = features()
    ours, theirs = relation(adapter(student["c3"])), relation(teacher["c3"])
    expected = ((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).mean()
    assert loss(student, teacher)["loss_non_local"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
