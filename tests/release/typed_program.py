"""What a user writes, for mypy --strict against the installed package; `.ci/release` runs it.

Wrong uses carry the code of the error that they must give: mypy's `warn_unused_ignores`, part of
`strict`, complains of one that it accepts.
"""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import featkd
from featkd import testing
from featkd.matching import Layer, LayerMatch
from featkd.report import Report

if TYPE_CHECKING:
    from typing_extensions import assert_type  # typing has it from Python 3.11 on

MAP = torch.zeros(2, 8, 4, 6)
CHANNELS = {"c3": 8, "c4": 16}


def train(student: nn.Module, teacher: nn.Module, batches: Iterable[Tensor]) -> Report:
    settings = featkd.Hyperparameters(alpha=0, beta=1.0, gamma=0, temperature=0.5, fusion="logits")
    loss = featkd.FeatureDistillationLoss(
        CHANNELS, {"c3": 16, "c4": 32}, hyperparameters=settings, subsample={"c3": 4, "c4": 2}
    )
    distiller = featkd.Distiller(
        student,
        teacher,
        loss,
        {"c3": "backbone.layer2", "c4": ("backbone.layer3", "backbone.2")},
        shared_input="backbone",
        convert_input=torch.neg,
        student_forward=lambda model, batch: model(batch),
        calls={"c3": 1},
        convert={"c4": (None, partial(featkd.from_tokens, size=(4, 6), prefix=1))},
    )
    optimizer = torch.optim.AdamW(distiller.parameters())
    for batch in batches:
        output, losses = distiller.forward(batch)
        assert_type(output, Any)
        assert_type(losses, dict[str, Tensor])
        assert_type(output + losses["loss_non_local"], Any)
        optimizer.zero_grad()
    assert_type(distiller.teacher, nn.Module)
    report = distiller.report(torch.zeros(2, 3, 64, 96), optimizer=optimizer)
    assert_type(report.levels[0].student_stride, float | None)
    return report


def tapped(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with featkd.FeatureTap(
        model,
        {"c3": "backbone[0]", "c4": "vit.blocks.8"},
        convert={"c3": featkd.from_channels_last, "c4": featkd.PatchTokens((14, 14), prefix=5)},
    ) as tap:
        assert_type(tap, featkd.FeatureTap)
        model(images)
        return tap.pop()


def matched(student: nn.Module, teacher: nn.Module) -> featkd.FeatureDistillationLoss:
    match = featkd.match_layers(student, teacher, torch.zeros(1, 3, 64, 96), mode="tensor")
    assert_type(match, LayerMatch)
    assert_type(match.layers, dict[str, tuple[str, str]])
    match = match.select("c3")
    for ours, _ in match.pairs.values():
        assert_type(ours, Layer)
        assert_type(ours.channels, int)
    loss = featkd.FeatureDistillationLoss(
        match.student_channels, match.teacher_channels, hyperparameters=featkd.STANDARDIZED
    )
    featkd.Distiller(student, teacher, loss, match.layers, convert=match.convert)
    return loss


def functions(student: Tensor, teacher: Tensor) -> None:
    ours, theirs = (featkd.spatial_attention(x, absolute=True) for x in (student, teacher))
    mask = featkd.attention_mask(ours, theirs, temperature=0.5, fusion="probabilities")
    assert_type(mask, Tensor)
    for loss in (
        featkd.attention_masked_loss(student, teacher, spatial_mask=mask, reduction="none"),
        featkd.attention_transfer_loss(student, teacher, spatial_adapter=nn.Conv2d(1, 1, 3)),
        featkd.non_local_loss(
            featkd.dot_product_relation(student, student, student),
            featkd.embedded_gaussian_relation(teacher, teacher, teacher, scale=0.5),
        ),
    ):
        assert_type(loss, Tensor)
    single = featkd.FeatureDistillationLoss(8, 16, hyperparameters=featkd.TWO_STAGE)
    assert_type(single.forward(student, teacher), dict[str, Tensor])


def test_a_loss_of_ones_own() -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()

    pairs = testing.feature_pairs(channels=4, teacher_channels=(3, 5), magnitudes=[1.0])
    testing.check(loss, [*testing.LOSS, testing.assert_descends], pairs=pairs)
    testing.check(featkd.AttentionMaskedLoss(4, 4, temperature=0.5))


def wrong(model: nn.Module) -> None:
    featkd.spatial_attention(MAP, False)  # type: ignore[call-arg]
    featkd.attention_mask(MAP, MAP)  # type: ignore[call-arg]
    featkd.attention_mask(MAP, MAP, temperature="0.5")  # type: ignore[arg-type]
    featkd.attention_mask(MAP, MAP, temperature=1, fusion="sum")  # type: ignore[arg-type]
    featkd.attention_masked_loss(MAP, MAP, reduction="median")  # type: ignore[arg-type]
    featkd.attention_masked_loss(MAP, None)  # type: ignore[arg-type]
    featkd.gaussian_relation([MAP], MAP)  # type: ignore[arg-type]
    featkd.AttentionMaskedLoss(8, 8)  # type: ignore[call-arg]
    featkd.NonLocalRelation(8, kind="cosine")  # type: ignore[arg-type]
    featkd.NonLocalLoss("8", 8, kind="gaussian")  # type: ignore[arg-type]
    featkd.FeatureDistillationLoss(8, 8, hyperparameters={})  # type: ignore[arg-type]
    featkd.FeatureDistillationLoss([8], [8], hyperparameters=featkd.ONE_STAGE)  # type: ignore[arg-type]
    featkd.Hyperparameters(alpha=1, beta=1, gamma=1)  # type: ignore[call-arg]
    featkd.STANDARDIZED.alpha = 1.0  # type: ignore[misc]
    featkd.FeatureTap(model, 3)  # type: ignore[arg-type]
    featkd.FeatureTap("backbone", ["0"])  # type: ignore[arg-type]
    featkd.FeatureTap(model, ["0"], calls={"0": "1"})  # type: ignore[dict-item]
    featkd.Distiller(model, model, model, ["0"])  # type: ignore[arg-type]
    featkd.Distiller(model, model, model, {"c3": ("0", "1", "2")})  # type: ignore[dict-item]
    featkd.Distiller(model, model, model, {}, teacher_forward=3)  # type: ignore[arg-type]
    featkd.match_layers(model, MAP)  # type: ignore[arg-type]
    featkd.from_tokens(MAP, 4)  # type: ignore[arg-type]
    featkd.PatchTokens(14, 5)  # type: ignore[call-arg]
    featkd.PatchTokens("14")  # type: ignore[arg-type]
    testing.check(lambda student: student)  # type: ignore[arg-type, misc]
    featkd.attention_loss()  # type: ignore[attr-defined]
