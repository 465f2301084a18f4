"""The runs of each table, and which tables choose the settings of others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.study.cells import best, best_everywhere
from benchmarks.study.lines import lines_of, pending
from benchmarks.study.runs import BOARDS, PASTED, Data, Line, Run, Teacher, distilled, plain_run
from benchmarks.study.settings import (
    ABLATION,
    AT_FPN,
    ATTENTION,
    BY_GRADIENT,
    CANDIDATES,
    CHOICES,
    FPN,
    FPN_OUTPUTS,
    LOSES_AT_FPN,
    MASKS,
    NEAR_BOXES,
    NEEDS_RELU,
    NORMALIZED,
    ON_PICTURES,
    OPEN,
    PRESETS,
    RELATIONS,
    SCALE_FREE,
    SCHEDULES,
    SENSITIVITY,
    STANDARDIZED,
    STEADINESS,
    TEACHER_RELATION,
    TRUE_BOXES,
    TWO_STAGE_AT_FPN,
    UNITS,
    UNTUNED,
    settings_of,
    with_mask,
)
from examples.detection.detectors import BACKBONES, COMPACT, MASK_RCNN, STUDENT, Shape
from examples.detection.lite0 import LITE0, LITE0_SHORT

# Weights and settings are chosen on other seeds and other held-out scenes than those reported.
MAIN, TUNE = Data(2**32), Data(2**31)
SPARSE = Data(2**32, "sparse")
SPARSE_TEACHERS = [Teacher(steps=1180)]
# Both kinds, with their teachers.
Scenes = tuple[Data, list[Teacher]]
SCENES: list[Scenes] = [(MAIN, [Teacher()]), (SPARSE, SPARSE_TEACHERS)]
SPARSE_TUNE: list[Scenes] = [(Data(2**31, "sparse"), SPARSE_TEACHERS)]
# All tiles of its two lists.
PICTURES = Data(0, BOARDS, 4000, 2000)
PICTURE_TEACHERS = [Teacher(steps=2000)]
PICTURE_STEPS = 1000
PASTED_SCENES = Data(2**32, PASTED)
# Its body comes trained: FPN and head are left.
PASTED_TEACHERS = [Teacher(LITE0, steps=1000)]
MAIN_SEEDS, SECONDARY_SEEDS, TUNE_SEEDS, OPEN_SEEDS = (
    range(20, 25),
    range(20, 23),
    range(2),
    range(2),
)
# Whose tuned weights a detector gets.
TUNED_ON = {"faster_rcnn": "fcos", "retinanet": "fcos", "fcos": "fcos"}
TEACHERS = [
    *(Teacher(steps=steps) for steps in (250, 500)),
    *(Teacher((width, 1, 64)) for width in (8, 12, 16, 24, 32)),
]


def tune_runs(lines: Iterable[Line]) -> list[Run]:
    runs = []
    for detector in dict.fromkeys(TUNED_ON.values()):
        for seed in TUNE_SEEDS:
            plain = plain_run(detector, seed, TUNE)
            runs += [plain, *distilled(plain, CANDIDATES)]
    return runs


def tap_runs(lines: Iterable[Line]) -> list[Run]:
    """Every method at its tuned setting, at the backbone's stages and at the FPN's outputs.

    At the FPN, which is another scale, with other weights too.

    `LookupError` where the tune table is not finished.
    """
    chosen = best(finished("tune", tune_runs(lines), lines))
    runs = []
    for detector, tuned_on in TUNED_ON.items():
        settings = {"featkd": [settings_of(NORMALIZED)]} | {
            method: [chosen[tuned_on, method]] for method in list(CANDIDATES)[1:]
        }
        for method in settings.keys() - NEEDS_RELU:
            at_fpn = settings[method][0] | FPN
            settings[method].append(at_fpn)
            if method not in LOSES_AT_FPN | {"featkd"}:
                weight = at_fpn["weight"]
                settings[method] += [at_fpn | {"weight": weight * by} for by in (0.25, 4.0)]
        settings["featkd"] += AT_FPN
        for seed in TUNE_SEEDS:
            plain = plain_run(detector, seed, TUNE)
            runs += [plain, *distilled(plain, settings)]
    return runs


def main_runs(lines: Iterable[Line]) -> list[Run]:
    """The methods at their tuned settings and taps, and more of featkd's settings.

    `LookupError` where the tables before it are not finished.
    """
    chosen = best(finished("taps", tap_runs(lines), lines))
    settings = {
        detector: {method: [chosen[detector, method]] for method in CANDIDATES}
        for detector in TUNED_ON
    }
    runs = []
    for seed in MAIN_SEEDS:
        for detector, own in settings.items():
            presets = [*own["featkd"], *UNTUNED]
            plain = plain_run(detector, seed, MAIN)
            runs += [plain, *distilled(plain, own | {"featkd": presets})]
    # The tuned setting may be one of the presets.
    return list({run.identity: run for run in runs}.values())


def one_setting_each(lines: Iterable[Line]) -> dict[str, list[dict[str, Any]]]:
    """The presets, and of every other method the setting of the highest mean over detectors."""
    chosen = best_everywhere(finished("taps", tap_runs(lines), lines))
    return {"featkd": UNTUNED} | {method: [chosen[method]] for method in list(CANDIDATES)[1:]}


def sparse_runs(lines: Iterable[Line]) -> list[Run]:
    """Presets and methods at one setting each: the best of dense scenes over all detectors.

    `LookupError` where the table that says so is not finished.
    """
    settings = one_setting_each(lines)
    runs = []
    for seed in MAIN_SEEDS:
        for detector in TUNED_ON:
            plain = plain_run(detector, seed, SPARSE)
            runs += [plain, *distilled(plain, settings, SPARSE_TEACHERS)]
    return runs


def picture_runs(lines: Iterable[Line]) -> list[Run]:
    """On real pictures each preset and method at the setting that it has everywhere.

    And the default told the boxes, as fine-grained imitation is.
    """
    settings = one_setting_each(lines)
    settings["featkd"] = [*settings["featkd"], NEAR_BOXES]
    runs = []
    for seed in MAIN_SEEDS:
        for detector in TUNED_ON:
            plain = plain_run(detector, seed, PICTURES, PICTURE_STEPS)
            runs += [plain, *distilled(plain, settings, PICTURE_TEACHERS)]
    return runs


def pasted_runs(lines: Iterable[Line]) -> list[Run]:
    """FCOS taught by ImageNet's features, each method at the setting that it has everywhere."""
    chosen = best_everywhere(finished("taps", tap_runs(lines), lines))
    settings = {"featkd": [STANDARDIZED | FPN]} | {
        method: [chosen[method]] for method in ("pkd", "fitnets")
    }
    runs = []
    for seed in MAIN_SEEDS:
        plain = plain_run("fcos", seed, PASTED_SCENES, PICTURE_STEPS)
        runs += [plain, *distilled(plain, settings, PASTED_TEACHERS)]
    for seed in SECONDARY_SEEDS:  # a student with ImageNet's features of its own
        plain = plain_run("fcos", seed, PASTED_SCENES, PICTURE_STEPS, LITE0_SHORT)
        runs += [plain, *distilled(plain, {"featkd": [STANDARDIZED | FPN]}, PASTED_TEACHERS)]
    return runs


def plateau_runs(lines: Iterable[Line]) -> list[Run]:
    """The steps that distillation saves: students that are trained longer, on real pictures."""
    runs = []
    for seed in SECONDARY_SEEDS:
        for steps in (PICTURE_STEPS, 2 * PICTURE_STEPS, 4 * PICTURE_STEPS):
            plain = plain_run("fcos", seed, PICTURES, steps)
            runs += [plain, *distilled(plain, {"featkd": [STANDARDIZED | FPN]}, PICTURE_TEACHERS)]
    return runs


def on_every_detector(
    settings: list[dict[str, Any]],
    seeds: Sequence[int],
    scenes: Sequence[Scenes] = SCENES[1:],
    steps: int = 600,
) -> Callable[[Iterable[Line]], list[Run]]:
    """featkd at several settings, on sparse scenes if no others are named."""

    def runs(lines: Iterable[Line]) -> list[Run]:
        result = []
        for seed in seeds:
            for detector in TUNED_ON:
                for data, teachers in scenes:
                    plain = plain_run(detector, seed, data, steps)
                    result += [plain, *distilled(plain, {"featkd": settings}, teachers)]
        return result

    return runs


def finished(table: str, runs: list[Run], lines: Iterable[Line]) -> list[Line]:
    missing = pending(runs, lines)
    if missing:
        left = len(missing)
        raise LookupError(f"wants `run {table}` finished first: {left} of its runs are left")
    return lines_of(runs, lines)


def quick_runs(lines: Iterable[Line]) -> list[Run]:
    """A handful of steps of every method on every detector: a test of the path."""
    data = replace(TUNE, train_images=32, held_out_images=8)
    runs = []
    for detector in COMPACT:
        plain = plain_run(detector, 0, data, steps=4)
        settings = {method: candidates[:1] for method, candidates in CANDIDATES.items()}
        runs += [plain, *distilled(plain, settings, [Teacher(steps=4)])]
    return runs


def secondary_runs(
    settings: list[dict[str, Any]],
    teachers: Sequence[Teacher] = (Teacher(),),
    seeds: Sequence[int] = SECONDARY_SEEDS,
    data: Data = MAIN,
    detector: str = "fcos",
    students: Sequence[Shape | str] = (STUDENT,),
    steps: int = 600,
) -> Callable[[Iterable[Line]], list[Run]]:
    """featkd at several settings, one detector and fewer seeds."""

    def runs(lines: Iterable[Line]) -> list[Run]:
        result = []
        for seed in seeds:
            for student in students:
                plain = plain_run(detector, seed, data, steps, student)
                result += [plain, *distilled(plain, {"featkd": settings}, teachers)]
        return result

    return runs


# From the lines so far to the runs.
TABLES: dict[str, Callable[[Iterable[Line]], list[Run]]] = {
    "tune": tune_runs,
    "presets": secondary_runs(PRESETS, seeds=OPEN_SEEDS, data=TUNE),
    "open": secondary_runs(OPEN, seeds=OPEN_SEEDS, data=TUNE),
    "taps": tap_runs,
    "main": main_runs,
    "ablation": secondary_runs(ABLATION),
    "relations": secondary_runs(RELATIONS),
    "attention": secondary_runs(ATTENTION),
    "sensitivity": secondary_runs(SENSITIVITY),
    "choices": secondary_runs(CHOICES),
    "teacher_relation": secondary_runs(TEACHER_RELATION),
    "teachers": secondary_runs([TWO_STAGE_AT_FPN], TEACHERS),
    "students": secondary_runs([TWO_STAGE_AT_FPN], students=[STUDENT, *BACKBONES]),
    "sparse": sparse_runs,
    "pictures": picture_runs,
    "pasted": pasted_runs,
    "picture_terms": secondary_runs(
        ON_PICTURES, PICTURE_TEACHERS, data=PICTURES, steps=PICTURE_STEPS
    ),
    "plateau": plateau_runs,
    "units": on_every_detector(
        UNITS, SECONDARY_SEEDS, [(PICTURES, PICTURE_TEACHERS)], PICTURE_STEPS
    ),
    "steadiness": on_every_detector(STEADINESS, SECONDARY_SEEDS, SCENES),
    "picture_weights": on_every_detector(
        STEADINESS, SECONDARY_SEEDS, [(PICTURES, PICTURE_TEACHERS)], PICTURE_STEPS
    ),
    "mask": on_every_detector(MASKS, TUNE_SEEDS, SPARSE_TUNE),
    "scale_free": secondary_runs(SCALE_FREE, SPARSE_TEACHERS, data=SPARSE),
    "schedules": secondary_runs(SCHEDULES, SPARSE_TEACHERS, data=SPARSE),
    "by_gradient": on_every_detector(BY_GRADIENT, MAIN_SEEDS[:2]),
    "true_boxes": on_every_detector(TRUE_BOXES, SECONDARY_SEEDS),
    # The widest interval of the default once more, and whether the mask narrows it.
    "ten_seeds": secondary_runs(
        [STANDARDIZED | FPN, with_mask(8.0)], SPARSE_TEACHERS, range(20, 30), SPARSE, "faster_rcnn"
    ),
    "masks": secondary_runs([FPN_OUTPUTS], detector=MASK_RCNN),
    "quick": quick_runs,
}
