"""Whether attention lies on the objects: positions and AUC on cases worked by hand; the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.study import attention
from benchmarks.study.__main__ import main
from benchmarks.study.attention import DETECTORS, measured
from benchmarks.study.plan import MAIN
from benchmarks.study.runs import Teacher, plain_run, teacher_of
from benchmarks.study.train import new_detector
from benchmarks.study.variants import inside

BOX = torch.tensor([[0.0, 0.0, 3.0, 2.0]])


class Stage(nn.Module):
    """Two channels of two by two positions, of which the box holds the first."""

    def __init__(self, features: list[list[float]]) -> None:
        super().__init__()
        self.features = torch.tensor(features).view(1, 2, 2, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.features


class Model(nn.Module):
    def __init__(self, features: list[list[float]]) -> None:
        super().__init__()
        self.stage = Stage(features)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.stage(images)


def test_a_position_is_inside_where_its_centre_is() -> None:
    # centres at 1 and 3 of 4 pixels: the box ends at x = 3, exclusive, and y = 2
    assert inside(BOX, (4, 4), 2, 2).tolist() == [[True, False], [False, False]]
    assert not inside(BOX[:0], (4, 4), 2, 2).any()


@pytest.mark.parametrize(
    ("features", "plain", "centred"),
    [
        ([[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], 1.0, 1.0),
        # the object is where the features are small: it stands out all the same
        ([[0.0, 5.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]], 0.0, 1.0),
        ([[2.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]], 0.5, 1 / 6),
    ],
)
def test_the_auc_of_attention_and_the_size_of_the_features(
    features: list[list[float]], plain: float, centred: float
) -> None:
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    found = measured(Model(features), ["stage"], [(picture, {"boxes": BOX})])
    assert found["stage"]["attention"] == pytest.approx(plain)
    assert found["stage"]["centred"] == pytest.approx(centred)
    squares = [value**2 for channel in features for value in channel]
    assert found["stage"]["rms"] == pytest.approx((sum(squares) / 8) ** 0.5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 40.0, 1e30])
def test_the_auc_is_of_the_order_alone(scale: float) -> None:
    scores = scale * torch.tensor([[1.0, 1.2, 1.5], [1.5, 2.0, 4.0]])
    objects = torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    # Of 1, 1.5 and 2 the objects' 1.2, 1.5 and 4 pass 1, 1.5 (a tie is a half) and 3. A float32
    # sigmoid, which torchmetrics takes outside 0 to 1, ties all of them at the ends of the scale.
    assert float(attention.auc(scores, objects)) == pytest.approx(5.5 / 9)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = replace(MAIN, train_images=4, held_out_images=4)
    monkeypatch.setattr(attention, "MAIN", data)
    for detector in DETECTORS:
        run = teacher_of(replace(plain_run(detector, 0, data), teacher=Teacher()))
        model = new_detector(run, "teacher", run.teacher.shape)
        torch.save(model.state_dict(), tmp_path / f"{run.name}.pt")
    main(["attention", "--output", str(tmp_path), "--results", str(tmp_path)])
    found = json.loads((tmp_path / "attention.json").read_text())["taps"]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 18
    for row, (detector, layer) in zip(
        rows, [(d, layer) for d, layers in found.items() for layer in layers], strict=True
    ):
        values = [found[detector][layer][name] for name in ("attention", "centred", "rms")]
        assert row == f"| {' | '.join([detector, layer, *(f'{x:.2f}' for x in values)])} |"
        assert all(0 <= value <= 1 for value in values[:2])
