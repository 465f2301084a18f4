"""What a run is: its JSON is its identity, and a run with a line is not repeated."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from typing import Any

from examples.detection.detectors import STUDENT, TEACHER, Shape

Line = dict[str, Any]
# Data of pictures, which are the same for all seeds, and what their option wants.
BOARDS, PASTED = "deeppcb", "pasted"
FOLDERS = {
    BOARDS: "a clone of DeepPCB or its PCBData",
    PASTED: "which python -m examples.detection.fetch_pasted makes",
}


@dataclass(frozen=True)
class Data:
    """Training scenes are those of the run's seed; the held-out ones the same for all seeds.

    `name`: `"scenes"`, densely filled, `"sparse"`, or one of `FOLDERS`.
    """

    held_out_seed: int
    name: str = "scenes"
    train_images: int = 4000
    held_out_images: int = 300


@dataclass(frozen=True)
class Teacher:
    """Trained once for all students, on drawn scenes that no student sees, or their pictures."""

    shape: Shape | str = TEACHER
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
    def taps(self) -> str:
        return self.hyperparameters.get("taps", "stages")

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
