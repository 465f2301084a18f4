"""What distillation gains, by detector and method: the runs, one line each, and their tables.

python -m benchmarks.study run tune        # chooses each method's weight
python -m benchmarks.study run main        # goes on where a killed command has stopped
python -m benchmarks.study tables          # results/lines.jsonl -> results/tables.md and plots

The same seed gives the same student start, scenes and data order for every method: paired runs.
"""

import argparse
import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache
from hashlib import sha256
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from tqdm import tqdm

import featkd
from benchmarks.measure import provenance
from benchmarks.study.methods.baseline import (
    AttentionTransfer,
    ChannelWiseDistillation,
    FeatureOverhaul,
    FineGrainedImitation,
    FitNets,
    PearsonDistillation,
    move_last_relu,
)
from benchmarks.study.tables import (
    against_first,
    best,
    comparison,
    contestants,
    gains_plot,
    gains_table,
    report,
    sensitivity_plot,
    teachers_plot,
)
from benchmarks.study.variants import featkd_loss
from examples.detectors import BACKBONES, COMPACT, MASK_RCNN, STUDENT, TEACHER, Shape, build, tapped
from examples.scenes import SIZE, Scenes
from examples.training import (
    MASK_METRICS,
    METRICS,
    Alone,
    Settings,
    evaluate,
    train,
    write_atomically,
)

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "lines.jsonl"
COLUMNS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
MASK_COLUMNS = ("mask_ap", "mask_ap50", "mask_ap75")
Line = dict[str, Any]


# --- what a run is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Training scenes are those of the run's seed; the held-out ones the same for all seeds."""

    held_out_seed: int
    name: str = "scenes"
    train_images: int = 4000
    held_out_images: int = 300


@dataclass(frozen=True)
class Teacher:
    """Trained once for all students, on scenes that no student sees."""

    shape: Shape = TEACHER
    seed: int = 10
    steps: int = 1000


@dataclass(frozen=True)
class Run:
    """Its JSON is its identity: a run with a line is not repeated."""

    detector: str
    student: Shape | str | None
    teacher: Teacher | None
    method: str
    seed: int
    steps: int
    data: Data
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        return identity(asdict(self))

    @property
    def name(self) -> str:
        """Of its files. The held-out scenes do not change what is trained."""
        trained = replace(self, data=replace(self.data, held_out_seed=0, held_out_images=0))
        mark = sha256(trained.identity.encode()).hexdigest()[:12]
        return f"{self.detector}-{self.method}-{self.seed}-{mark}"


def identity(line: Line) -> str:
    return json.dumps({key.name: line[key.name] for key in fields(Run)}, sort_keys=True)


def plain_run(
    detector: str, seed: int, data: Data, steps: int = 600, student: Shape | str = STUDENT
) -> Run:
    return Run(detector, student, None, "none", seed, steps, data)


def teacher_of(run: Run) -> Run:
    teacher = run.teacher
    return Run(run.detector, None, teacher, "teacher", teacher.seed, teacher.steps, run.data)


# --- the tables -----------------------------------------------------------------------------------

# Weights and settings are chosen on other seeds and other held-out scenes than those reported.
MAIN, TUNE = Data(2**32), Data(2**31)
MAIN_SEEDS, SECONDARY_SEEDS, TUNE_SEEDS, OPEN_SEEDS = (
    range(20, 25),
    range(20, 23),
    range(2),
    range(2),
)
# Whose tuned weights a detector gets.
TUNED_ON = {"faster_rcnn": "fcos", "retinanet": "fcos", "fcos": "fcos"}


def settings_of(base: featkd.Hyperparameters, **changes: Any) -> dict[str, Any]:
    """The fields without a default, and those that differ from it."""
    changed = replace(base, **changes)
    values = {each.name: (getattr(changed, each.name), each.default) for each in fields(changed)}
    return {
        name: value
        for name, (value, default) in values.items()
        if default is MISSING or value != default
    }


def weights(*values: float, **others: Any) -> list[dict[str, Any]]:
    return [{"weight": value, **others} for value in values]


# As many candidates for each. The middle of each row gives the student's backbone about the same
# gradient, 1 to 2 times the detector's own; the baselines' range is the wider, as less is known.
# The fifth of a baseline lies beyond or beside the best of the first four.
BASE = featkd.Hyperparameters(alpha=0.0, beta=4.0, gamma=0.0, temperature=0.5, normalize=True)
SQUARED = replace(BASE, reduction="mean_square")
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
        settings = {"featkd": [settings_of(featkd.NORMALIZED)]} | {
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
            presets = [*own["featkd"], FPN_OUTPUTS, *PRESETS_AT_STAGES]
            plain = plain_run(detector, seed, MAIN)
            runs += [plain, *distilled(plain, own | {"featkd": presets})]
    # The tuned setting may be one of the presets.
    return list({run.identity: run for run in runs}.values())


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
) -> Callable[[Iterable[Line]], list[Run]]:
    """featkd at several settings, one detector and fewer seeds."""

    def runs(lines: Iterable[Line]) -> list[Run]:
        result = []
        for seed in seeds:
            for student in students:
                plain = plain_run(detector, seed, data, student=student)
                result += [plain, *distilled(plain, {"featkd": settings}, teachers)]
        return result

    return runs


def distilled(
    plain: Run,
    settings: Mapping[str, Sequence[dict[str, Any]]],
    teachers: Sequence[Teacher] = (Teacher(),),
) -> list[Run]:
    return [
        replace(plain, teacher=teacher, method=method, hyperparameters=each)
        for teacher in teachers
        for method, candidates in settings.items()
        for each in candidates
    ]


def with_terms(base: featkd.Hyperparameters, *names: str, **changes: Any) -> dict[str, Any]:
    return settings_of(base, **dict.fromkeys(set(TERMS) - set(names), 0.0), **changes)


SPREAD, FPN = {"masks": "spread"}, {"taps": "fpn"}
TERMS = ("alpha", "beta", "gamma")
# The teachers' FPN outputs are 1.3 to 5 times as large as their stages (`study_attention.py`).
FPN_OUTPUTS = settings_of(featkd.FPN_OUTPUTS) | FPN
# FCOS's best in the taps table: what the tables of FCOS alone vary.
TWO_STAGE = replace(featkd.TWO_STAGE, temperature=4.0)
TWO_STAGE_AT_FPN = settings_of(TWO_STAGE) | FPN
AT_FPN = [
    FPN_OUTPUTS,
    TWO_STAGE_AT_FPN,
    settings_of(featkd.TWO_STAGE, beta=1e-3, temperature=4.0) | FPN,
    settings_of(featkd.NORMALIZED, beta=32.0, temperature=4.0) | FPN,
    *(
        settings_of(featkd.NORMALIZED, normalize=False, beta=beta, temperature=4.0) | FPN
        for beta in (1e-3, 4e-3)
    ),
]
PRESETS_AT_STAGES = [settings_of(featkd.NORMALIZED), settings_of(featkd.ONE_STAGE)]
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
OPEN = [
    settings_of(BASE),
    settings_of(featkd.TWO_STAGE),
    settings_of(featkd.RELEASED_ONE_STAGE),
    settings_of(featkd.RELEASED_TWO_STAGE),
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
    *(
        settings_of(preset) | FPN
        for preset in (
            featkd.ONE_STAGE,
            featkd.TWO_STAGE,
            featkd.RELEASED_ONE_STAGE,
            featkd.RELEASED_TWO_STAGE,
        )
    ),
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
TEACHER_RELATION = [
    *(
        with_terms(TWO_STAGE, "gamma", teacher_relation=of_teacher, residual=residual) | FPN
        for of_teacher in ("fixed", "trained")
        for residual in (False, True)
    ),
    with_terms(TWO_STAGE, "gamma") | FPN | {"relation": "tied"},
]
TEACHERS = [
    *(Teacher(steps=steps) for steps in (250, 500)),
    *(Teacher((width, 1, 64)) for width in (8, 12, 16, 24, 32)),
]

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
    "masks": secondary_runs([FPN_OUTPUTS], detector=MASK_RCNN),
    "quick": quick_runs,
}


# --- one run --------------------------------------------------------------------------------------


def imitation_loss(student: Mapping[str, int], *others: Any, **hyperparameters: Any) -> nn.Module:
    # RetinaNet's and Faster R-CNN's own anchors; FCOS, which has none, gets the same.
    sizes = dict(zip(student, ((10, 14), (20, 28), (40, 56)), strict=True))
    return FineGrainedImitation(student, *others, anchor_sizes=sizes, **hyperparameters)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "featkd": featkd_loss,
    "fitnets": FitNets,
    "at": AttentionTransfer,
    "fgfi": imitation_loss,
    "overhaul": FeatureOverhaul,
    "cwd": ChannelWiseDistillation,
    "pkd": PearsonDistillation,
}

# A worker draws the scenes of a seed once, and the held-out ones: runs go seed by seed.
scenes = lru_cache(maxsize=3)(Scenes)


def new_detector(run: Run, role: str, shape: Shape | str) -> nn.Module:
    torch.manual_seed(run.seed)
    return build(run.detector, role, len(Scenes.classes), SIZE, shape)


def new_model(run: Run, folder: Path, device: torch.device) -> nn.Module:
    """A distiller, or the detector alone."""
    if run.method == "teacher":
        return Alone(new_detector(run, "teacher", run.teacher.shape))
    student = new_detector(run, "student", run.student)
    if run.method == "none":
        return Alone(student)
    teacher = new_detector(run, "teacher", run.teacher.shape)
    weights = torch.load(
        folder / f"{teacher_of(run).name}.pt", map_location="cpu", weights_only=True
    )
    teacher.load_state_dict(weights)
    taps = run.hyperparameters.get("taps", "stages")
    layers, channels = tapped(student, teacher, taps, SIZE)
    settings = dict(run.hyperparameters)
    if run.method == "featkd":
        settings["steps"] = run.steps
    else:
        settings.pop("taps", None)
    loss = LOSSES[run.method](*channels, **settings)
    if run.method == "fgfi":
        loss.watch(student)
    if run.method == "overhaul":
        layers = {
            level: (ahead_of_last_relu(student, ours), ahead_of_last_relu(teacher, theirs))
            for level, (ours, theirs) in layers.items()
        }
    teacher.to(device)
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")


def ahead_of_last_relu(model: nn.Module, path: str) -> str:
    stage = model.get_submodule(path)
    last = len(stage) - 1
    move_last_relu(stage)
    return f"{path}.{last}"


def perform(run: Run, folder: Path, device_type: str) -> Line:
    """Trains and evaluates; goes on from the run's checkpoint. Its weights stay in `folder`.

    Its bar and its warnings go to a log there.
    """
    with (folder / f"{run.name}.log").open("a") as log, redirect_stderr(log):
        return line_of(run, folder, torch.device(device_type))


def line_of(run: Run, folder: Path, device: torch.device) -> Line:
    settings = Settings(
        batch_size=8,
        learning_rate=3e-3,
        seed=run.seed,
        device=device,
        amp=False,
        workers=0,
        checkpoint_every=100,
        evaluations=0,
        # COCO's small objects are under 32 pixels wide: a third of a scene of 96.
        area_scale=2.0,
    )
    model = new_model(run, folder, device)
    with_masks = run.detector == MASK_RCNN
    data = scenes(run.seed, run.data.train_images, with_masks)
    held_out = scenes(run.data.held_out_seed, run.data.held_out_images, with_masks)
    checkpoint = folder / f"{run.name}.checkpoint.pt"
    curve = train(run.name, model, data, held_out, run.steps, settings, checkpoint)
    metrics = evaluate(model.student, held_out, settings)
    write_atomically(folder / f"{run.name}.pt", model.student.state_dict())
    made = provenance(device)
    # The evaluator says -1 where no held-out object has the size.
    values = [metrics[name] if metrics[name] >= 0 else None for name in METRICS]
    masks = [metrics[name] for name in MASK_METRICS if name in metrics]
    return {
        **asdict(run),
        **dict(zip(COLUMNS, values, strict=True)),
        **dict(zip(MASK_COLUMNS, masks, strict=False)),
        "seconds": round(curve.seconds, 1),
        "device": made["machine"],
        "versions": {
            **{name: made[name] for name in ("commit", "featkd", "torch", "python")},
            "torchvision": torchvision.__version__,
        },
    }


# --- all runs -------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[Line]:
    """The last of each identity. A half-written end, which a kill has left, is cut off."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_whole(file, whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    return list({identity(line): line for line in lines}.values())


def write_whole(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


def append_line(file: Path, line: Line) -> None:
    with file.open("ab") as stream:
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def lines_of(runs: Iterable[Run], lines: Iterable[Line]) -> list[Line]:
    """In the order of `runs`."""
    known = {identity(line): line for line in lines}
    return [known[run.identity] for run in runs if run.identity in known]


def pending(runs: Iterable[Run], lines: Iterable[Line]) -> list[Run]:
    """Each of `runs` that has no line, once."""
    done = {identity(line) for line in lines}
    return [run for name, run in {run.identity: run for run in runs}.items() if name not in done]


def teachers_to_train(runs: Iterable[Run], lines: Iterable[Line], folder: Path) -> list[Run]:
    """Without a line, or without the weights, which are no part of the results."""
    teachers = [teacher_of(run) for run in runs if run.teacher is not None]
    kept = [line for line in lines if line["method"] == "teacher"]
    trained = {run.identity for run in teachers if (folder / f"{run.name}.pt").exists()}
    return pending(teachers, [line for line in kept if identity(line) in trained])


def execute(runs: list[Run], file: Path, folder: Path, workers: int, device_type: str) -> int:
    """Performs the runs that have no line, teachers first; the number of those that failed."""
    lines = read_lines(file)
    students = pending(runs, lines)
    teachers = teachers_to_train(students, lines, folder)
    if not students:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    pool = worker_pool(workers, device_type)
    try:
        with tqdm(total=len(teachers) + len(students), unit="run") as bar:
            for phase in (teachers, students):
                futures = {pool.submit(perform, run, folder, device_type): run for run in phase}
                for future in as_completed(futures):
                    run, error = futures[future], future.exception()
                    if isinstance(error, BrokenExecutor):
                        raise error
                    if error is not None:
                        failed += 1
                        text = "".join(traceback.format_exception(error))
                        bar.write(f"{run.name} failed:\n{text}")
                    else:
                        line = future.result() | {"teacher_ap": teacher_ap(run, lines)}
                        append_line(file, line)
                        lines.append(line)
                        remove_traces(run, folder)
                        bar.write(f"{run.name}: AP {line['ap']:.3f}, {line['seconds']:.0f} s")
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def remove_traces(run: Run, folder: Path) -> None:
    """What a finished run needs no more; a teacher is evaluated on other scenes too."""
    (folder / f"{run.name}.log").unlink()
    if run.method != "teacher":
        (folder / f"{run.name}.checkpoint.pt").unlink()


def teacher_ap(run: Run, lines: Iterable[Line]) -> float | None:
    if run.method in ("none", "teacher"):
        return None
    return lines_of([teacher_of(run)], lines)[-1]["ap"]


def worker_pool(workers: int, device_type: str) -> ProcessPoolExecutor:
    """Shares out the threads, and the GPUs in turn."""
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for i in range(workers):
        gpus.put(i % torch.cuda.device_count() if device_type == "cuda" else None)
    threads = max(1, torch.get_num_threads() // workers)
    return ProcessPoolExecutor(workers, context, start_worker, (gpus, threads))


def start_worker(gpus: Any, threads: int) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    gpu = gpus.get()
    if gpu is not None:
        torch.cuda.set_device(gpu)


def end_with_parent() -> None:
    """Or the workers of a killed command would train beside those of the next."""
    multiprocessing.parent_process().join()
    os._exit(1)


# --- commands -------------------------------------------------------------------------------------


def run_table(options: argparse.Namespace) -> None:
    workers = options.workers
    if workers is None:
        gpus = torch.cuda.device_count() if options.device == "cuda" else 0
        workers = gpus or torch.get_num_threads()
    # The lines of a mere test of the path stay out of the results.
    file = options.output / "quick.jsonl" if options.table == "quick" else LINES
    try:
        runs = TABLES[options.table](read_lines(file))
    except LookupError as error:
        raise SystemExit(f"{options.table} {error.args[0]}") from error
    failed = execute(runs, file, options.output, workers, options.device)
    if failed:
        raise SystemExit(f"failed runs: {failed}; the same command tries them again")


def write_tables(options: argparse.Namespace) -> None:
    lines = read_lines(LINES)
    parts = ["# Study\n\n`python -m benchmarks.study tables` writes this file and its plots."]
    for name, table in TABLES.items():
        try:
            runs = table(lines)
        except LookupError:
            continue
        found = lines_of(runs, lines)
        if not found:
            continue
        left = len(pending(runs, lines))
        unfinished = f" {left} of its runs are not there yet." if left else ""
        parts.append(f"## {name}\n\n`python -m benchmarks.study run {name}`{unfinished}")
        parts.append(report(found))
        if name in ("sensitivity", "choices", "teacher_relation"):
            parts.append(against_first(found))
        if name == "masks":
            parts += ["Masks:", report([as_mask_line(line) for line in found])]
        if name == "main":
            rivals = contestants(found, best(lines_of(tap_runs(lines), lines)))
            parts += [
                "AP points over the plain student, same seeds:",
                gains_table(*rivals),
                "AP points of featkd less those of the others, same seeds:",
                comparison(*rivals),
            ]
            gains_plot(*rivals, LINES.with_name("gains.png"))
            parts.append("![paired gains](gains.png)")
        if name == "teachers":
            teachers_plot(found, LINES.with_name("teachers.png"))
            parts.append("![student over teacher](teachers.png)")
        if name == "sensitivity" and not left:
            sensitivity_plot(found, LINES.with_name("sensitivity.png"))
            parts.append("![AP over each hyperparameter](sensitivity.png)")
        if name == "tune":
            chosen = best(found).items()
            items = [f"- {detector}, {method}: {values}" for (detector, method), values in chosen]
            parts.append("\n".join(["Best by mean AP:\n", *items]))
    LINES.with_name("tables.md").write_text("\n\n".join(parts) + "\n")
    print(LINES.with_name("tables.md"))


def as_mask_line(line: Line) -> Line:
    """With the masks' metrics in the place of the boxes'; none by size, none of the teacher."""
    ap = dict(zip(COLUMNS, (line[name] for name in MASK_COLUMNS), strict=False))
    return line | dict.fromkeys(COLUMNS) | ap | {"teacher_ap": None}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="perform a table's runs that are not there yet")
    run.add_argument("table", choices=TABLES)
    run.add_argument("--workers", type=int, help="default: one a GPU, else one a thread")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--output", type=Path, default=Path("runs/study"), help="weights")
    run.set_defaults(command=run_table)
    commands.add_parser("tables", help="write the tables").set_defaults(command=write_tables)
    options = parser.parse_args(arguments)
    options.command(options)
