"""Hyperparameters and the presets."""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

import featkd

RELEASED = {
    "fusion": "probabilities",
    "absolute": False,
    "reduction": "norm",
    "residual": True,
    "batch_norm": True,
    "teacher_relation": "trained",
    "kind": "dot_product",
    "transfer_attention": "both",
    "normalize": False,
}
PRINTED = {
    "fusion": "logits",
    "absolute": True,
    "reduction": "mean",
    "residual": False,
    "batch_norm": False,
    "teacher_relation": "fixed",
    "transfer_attention": "both",
    "masked_attention": "both",
    "normalize": False,
}


@pytest.mark.parametrize(
    ("name", "weights", "temperature", "settings"),
    [
        ("TWO_STAGE", (7e-5, 4e-3, 7e-5), 0.1, PRINTED),
        ("ONE_STAGE", (4e-4, 2e-2, 4e-4), 0.5, PRINTED),
        ("FPN_OUTPUTS", (4e-4, 2e-2, 4e-4), 4.0, PRINTED),
        ("RELEASED_TWO_STAGE", (4e-3, 7e-5, 7e-5), 0.5, RELEASED | {"masked_attention": "spatial"}),
        (
            "RELEASED_ONE_STAGE",
            (4e-3 * 6, 7e-5 * 6, 7e-5 * 6),
            0.1,
            RELEASED | {"masked_attention": "both"},
        ),
    ],
)
def test_presets(name, weights, temperature, settings):
    preset = getattr(featkd, name)
    assert (preset.alpha, preset.beta, preset.gamma) == pytest.approx(weights, rel=1e-12)
    assert preset.temperature == temperature
    assert {key: getattr(preset, key) for key in settings} == settings


def test_the_guide_s_table_has_their_numbers():
    page = Path(__file__).parents[1] / "docs" / "presets.md"
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \| ([^|]+) \|", page.read_text(), re.MULTILINE
    )
    said = {name: (*map(float, weights), temperature) for name, *weights, temperature in rows}
    presets = {
        name: value
        for name, value in vars(featkd).items()
        if isinstance(value, featkd.Hyperparameters)
    }
    assert said == {
        name: (
            preset.alpha,
            preset.beta,
            preset.gamma,
            "no masks" if preset.temperature is None else f"{preset.temperature:g}",
        )
        for name, preset in presets.items()
    }


def test_hyperparameters_are_frozen_and_can_be_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        featkd.TWO_STAGE.alpha = 1.0
    changed = dataclasses.replace(featkd.TWO_STAGE, temperature=0.5)
    assert (changed.temperature, changed.alpha) == (0.5, featkd.TWO_STAGE.alpha)
    assert featkd.TWO_STAGE.temperature == 0.1
    assert pickle.loads(pickle.dumps(changed)) == changed
