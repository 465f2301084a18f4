"""The settings that the tables try: hyperparameters of featkd and of the other methods."""

from dataclasses import MISSING, fields, replace
from itertools import combinations
from math import sqrt
from typing import Any

import featkd

TERMS = ("alpha", "beta", "gamma")
SPREAD, FPN = {"masks": "spread"}, {"taps": "fpn"}


def settings_of(base: featkd.Hyperparameters, **changes: Any) -> dict[str, Any]:
    """The fields without a default, and those that differ from it."""
    changed = replace(base, **changes)
    values = {each.name: (getattr(changed, each.name), each.default) for each in fields(changed)}
    return {
        name: value
        for name, (value, default) in values.items()
        if default is MISSING or value != default
    }


def with_terms(base: featkd.Hyperparameters, *names: str, **changes: Any) -> dict[str, Any]:
    return settings_of(base, **dict.fromkeys(set(TERMS) - set(names), 0.0), **changes)


def weights(*values: float, **others: Any) -> list[dict[str, Any]]:
    return [{"weight": value, **others} for value in values]


# As many candidates for each. The middle of each row gives the student's backbone about the same
# gradient, 1 to 2 times the detector's own; the baselines' range is the wider, as less is known.
# The fifth of a baseline lies beyond or beside the best of the first four.
BASE = featkd.Hyperparameters(alpha=0.0, beta=4.0, gamma=0.0, temperature=0.5, normalize=True)
SQUARED = replace(BASE, reduction="mean_square")
# The tune and presets tables' choice at the stages; no preset, as it lost on sparse scenes.
NORMALIZED = replace(SQUARED, beta=8.0, temperature=1.0)
CANDIDATES = {
    "featkd": [
        settings_of(featkd.ONE_STAGE),
        *(settings_of(SQUARED, beta=beta) for beta in (4.0, 8.0, 16.0, 32.0)),
    ],
    "fitnets": weights(0.25, 1.0, 4.0, 16.0, 64.0),
    "at": weights(0.25, 1.0, 4.0, 16.0, 8.0),
    "fgfi": weights(0.002, 0.008, 0.032, 0.128, 0.064),
    "overhaul": weights(1e-5, 4e-5, 16e-5, 64e-5, 8e-5),
    "cwd": weights(0.25, 1.0, 4.0, 16.0, temperature=4.0) + weights(4.0, temperature=1.0),
    "pkd": weights(0.25, 1.0, 4.0, 16.0, 64.0),
}
NEEDS_RELU = {"overhaul"}  # in front of its taps
LOSES_AT_FPN = {"at"}  # on every detector
ALL_TERMS = replace(BASE, alpha=1.0, gamma=1.0)
# The teachers' FPN outputs are 1.3 to 5 times as large as their stages (`attention.py`).
FPN_OUTPUTS = settings_of(featkd.FPN_OUTPUTS) | FPN
# FCOS's best in the taps table: what the tables of FCOS alone vary.
TWO_STAGE = replace(featkd.TWO_STAGE, temperature=4.0)
TWO_STAGE_AT_FPN = settings_of(TWO_STAGE) | FPN
AT_FPN = [
    FPN_OUTPUTS,
    TWO_STAGE_AT_FPN,
    settings_of(featkd.TWO_STAGE, beta=1e-3, temperature=4.0) | FPN,
    settings_of(NORMALIZED, beta=32.0, temperature=4.0) | FPN,
    *(
        settings_of(NORMALIZED, normalize=False, beta=beta, temperature=4.0) | FPN
        for beta in (1e-3, 4e-3)
    ),
]
STANDARDIZED = settings_of(featkd.STANDARDIZED)


def with_mask(temperature: float, part: str = "spatial") -> dict[str, Any]:
    """The paper's mask in that form; of 8 standard deviations it is mild."""
    preset = featkd.STANDARDIZED
    return settings_of(preset, temperature=temperature, masked_attention=part) | FPN


MASKS = [STANDARDIZED | FPN, *map(with_mask, (2.0, 4.0, 8.0, 16.0))]
ABLATION = [
    with_terms(TWO_STAGE, *names) | FPN
    for count in (1, 2, 3)
    for names in combinations(TERMS, count)
]
RELATIONS = [
    with_terms(TWO_STAGE, "gamma", kind=kind) | FPN
    for kind in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
]
ATTENTION = [
    with_terms(TWO_STAGE, "alpha", "beta", transfer_attention=part, masked_attention=part) | FPN
    for part in ("spatial", "channel", "both")
]
SENSITIVITY = [
    TWO_STAGE_AT_FPN,
    *(
        settings_of(TWO_STAGE, **{name: getattr(TWO_STAGE, name) * factor}) | FPN
        for name in TERMS
        for factor in (0.25, 4.0)
    ),
    *(settings_of(TWO_STAGE, temperature=value) | FPN for value in (0.5, 1.0, 2.0, 16.0)),
]
PRESETS = [
    *(settings_of(BASE, beta=beta) for beta in (1.0, 2.0, 4.0, 8.0)),
    settings_of(featkd.ONE_STAGE),
    settings_of(featkd.ONE_STAGE, beta=0.01),
    settings_of(featkd.ONE_STAGE, beta=0.04),
    settings_of(featkd.ONE_STAGE, temperature=1.0),
    settings_of(featkd.ONE_STAGE, alpha=0.0),
    settings_of(featkd.ONE_STAGE, gamma=0.0),
    *(settings_of(featkd.ONE_STAGE, alpha=0.0, gamma=0.0, beta=beta) for beta in (0.02, 0.04)),
    # The teacher's features have a root mean square of about 1.
    settings_of(BASE, normalize=False) | {"unit": "element"},
    *(settings_of(SQUARED, beta=beta) for beta in (4.0, 8.0, 16.0, 32.0)),
    *(settings_of(SQUARED, beta=8.0, temperature=value) for value in (0.25, 1.0)),
    settings_of(SQUARED, beta=8.0, temperature=1.0, gamma=0.1),
    settings_of(SQUARED, beta=8.0, masked_attention="spatial"),
    settings_of(ALL_TERMS),
    *(
        settings_of(ALL_TERMS, alpha=alpha, gamma=gamma)
        for alpha, gamma in ((0.5, 0.5), (2.0, 2.0), (1.0, 4.0), (4.0, 1.0))
    ),
    settings_of(ALL_TERMS, beta=16.0, reduction="mean_square"),
    settings_of(BASE, temperature=2.0) | SPREAD,
    settings_of(SQUARED, beta=16.0, temperature=2.0) | SPREAD,
    settings_of(BASE, temperature=1e6),
]
# The lines of these are from before the presets had their block's normalisation.
RELEASED = [
    replace(preset, batch_norm=False)
    for preset in (featkd.RELEASED_ONE_STAGE, featkd.RELEASED_TWO_STAGE)
]
OPEN = [
    settings_of(BASE),
    settings_of(featkd.TWO_STAGE),
    *map(settings_of, RELEASED),
    settings_of(BASE) | FPN,
    settings_of(BASE, temperature=0.1),
    *(settings_of(BASE, temperature=value) | SPREAD for value in (1.0, 4.0)),
    with_terms(ALL_TERMS, "alpha", "beta"),
    with_terms(ALL_TERMS, "beta", "gamma"),
    settings_of(BASE, fusion="probabilities"),
    # The norm of 8 images' norms is about sqrt(8) times their mean.
    settings_of(BASE, reduction="norm", beta=4 / sqrt(8)),
    settings_of(BASE) | {"masks": "live"},
    *(
        settings_of(SQUARED, beta=8.0, temperature=value) | {"masks": "centred"}
        for value in (0.25, 0.5, 1.0)
    ),
    *(settings_of(BASE) | {"schedule": name} for name in ("warm-up", "decay")),
    *(
        with_terms(ALL_TERMS, "gamma", teacher_relation=of_teacher, residual=residual)
        for of_teacher in ("fixed", "trained")
        for residual in (False, True)
    ),
    with_terms(ALL_TERMS, "gamma") | {"relation": "tied"},
]
# The open questions once more, where distillation gains: the FPN's outputs, on the reported seeds.
# The first of a table is what the others are compared with.
CHOICES = [
    TWO_STAGE_AT_FPN,
    *(settings_of(preset) | FPN for preset in (featkd.ONE_STAGE, featkd.TWO_STAGE, *RELEASED)),
    # Masks that are even: all ones.
    settings_of(TWO_STAGE, temperature=1e6) | FPN,
    settings_of(TWO_STAGE, fusion="probabilities") | FPN,
    settings_of(
        TWO_STAGE,
        reduction="norm",
        **{name: getattr(TWO_STAGE, name) / sqrt(8) for name in TERMS},
    )
    | FPN,
    settings_of(TWO_STAGE) | FPN | {"masks": "live"},
    *(settings_of(TWO_STAGE, temperature=value) | FPN | SPREAD for value in (2.0, 4.0)),
    *(TWO_STAGE_AT_FPN | {"schedule": name} for name in ("warm-up", "decay")),
    # About the weight of 4e-3 at the levels' C H W, and at the teacher's norm.
    with_terms(replace(TWO_STAGE, beta=0.4), "beta") | FPN | {"unit": "element"},
    settings_of(BASE, beta=2.0, temperature=4.0) | FPN,
]
RELEASED_ONE_STAGE = settings_of(featkd.RELEASED_ONE_STAGE) | FPN
# One setting a preset, whatever the scenes: what a user has who tunes nothing.
UNTUNED = [
    STANDARDIZED | FPN,
    STANDARDIZED,
    FPN_OUTPUTS,
    settings_of(NORMALIZED),
    settings_of(featkd.ONE_STAGE),
    with_mask(8.0),
    RELEASED_ONE_STAGE,
]
STEADINESS = [
    settings_of(featkd.STANDARDIZED, beta=factor * featkd.STANDARDIZED.beta) | FPN
    for factor in (0.25, 1.0, 4.0)
]
# The three terms and masks of the scale-free form, on sparse scenes.
SCALE_FREE = [
    STANDARDIZED | FPN,
    *(
        settings_of(featkd.STANDARDIZED, beta=0.0, gamma=4.0, kind=kind) | FPN
        for kind in ("dot_product", "gaussian", "embedded_gaussian", "concatenation")
    ),
    settings_of(featkd.STANDARDIZED, beta=2.0, gamma=2.0) | FPN,
    *(settings_of(featkd.STANDARDIZED, alpha=alpha) | FPN for alpha in (0.1, 0.4)),
    *(with_mask(value, part) for part in ("spatial", "channel", "both") for value in (2.0, 8.0)),
]
# The default under the schedules of later recipes, and with its levels weighed by their positions.
SCHEDULES = [
    STANDARDIZED | FPN,
    *(STANDARDIZED | FPN | {"schedule": name} for name in ("decay", "cosine", "early end")),
    STANDARDIZED | FPN | {"levels": "positions"},
]
NEAR_BOXES = STANDARDIZED | FPN | {"masks": "near"}
# What fine-grained imitation has and the default has not: its positions, the teacher's own scale.
IN_TEACHER_UNITS = STANDARDIZED | FPN | {"unit": "teacher"}
NEAR_IN_TEACHER_UNITS = NEAR_BOXES | IN_TEACHER_UNITS
UNITS = [STANDARDIZED | FPN, NEAR_BOXES, IN_TEACHER_UNITS, NEAR_IN_TEACHER_UNITS]
# What a perfect mask would bring, and the paper's in its place.
TRUE_BOXES = [
    STANDARDIZED | FPN,
    STANDARDIZED | FPN | {"masks": "boxes"},
    NEAR_BOXES,
    NEAR_IN_TEACHER_UNITS,
    *map(with_mask, (8.0, 2.0)),
]
# Terms and masks on real pictures, with the perfect mask.
ON_PICTURES = [
    STANDARDIZED | FPN,
    settings_of(featkd.STANDARDIZED, beta=0.0, gamma=4.0) | FPN,
    settings_of(featkd.STANDARDIZED, beta=2.0, gamma=2.0) | FPN,
    settings_of(featkd.STANDARDIZED, alpha=0.4) | FPN,
    *(with_mask(2.0, part) for part in ("spatial", "channel", "both")),
    STANDARDIZED | FPN | {"masks": "boxes"},
]
# The printed form's weights, tuned for each detector and from the gradients of one batch.
BY_GRADIENT = [
    *(
        settings_of(
            featkd.FPN_OUTPUTS,
            **{name: factor * getattr(featkd.FPN_OUTPUTS, name) for name in TERMS},
        )
        | FPN
        for factor in (1 / 64, 1 / 16, 1 / 4, 1)
    ),
    *(FPN_OUTPUTS | {name: ratio} for name in ("ratio", "total") for ratio in (1.0, 4.0)),
]
TEACHER_RELATION = [
    *(
        with_terms(TWO_STAGE, "gamma", teacher_relation=of_teacher, residual=residual) | FPN
        for of_teacher in ("fixed", "trained")
        for residual in (False, True)
    ),
    with_terms(TWO_STAGE, "gamma") | FPN | {"relation": "tied"},
]
