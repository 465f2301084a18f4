"""The folder of a run: whose it is, who writes to it, and what may be removed from it.

A folder is a run's if it holds this job's `config.json`. Files of the names in `WRITTEN` alone are
ever removed, in such a folder alone, and never one that the command line names.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from examples.detection.checkpoints import replacing
from examples.detection.content import Content
from examples.detection.processes import JobError

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None  # type: ignore[assignment]

JOB = "featkd/distill_detector"
MODELS = ("teacher", "plain", "distilled")
# Of each run, what it leaves: the one that all was done for is the student.
WEIGHTS = {"teacher": "teacher.pt", "plain": "plain.pt", "distilled": "student.pt"}
EXPORTED = {"torch": "student.pt2", "onnx": "student.onnx"}
ENDINGS = (".pt", ".partial", ".checkpoint.pt", ".checkpoint.partial")
PICTURES = ("curves.png", "attention.png", "detections.png")
RESULTS = "results.json"
CONFIG = "config.json"
WRITTEN = (
    *(f"{model}{ending}" for model in MODELS for ending in ENDINGS),
    "student.pt",
    "student.partial",
    *EXPORTED.values(),
    *PICTURES,
    RESULTS,
    "results.partial",
    CONFIG,
)
# Options that name a file.
GIVEN = ("teacher", "teacher_weights", "student_weights", "annotations", "val_annotations")
# What may differ between an interrupted run and its resumption.
FREE = {
    "resume",
    "overwrite",
    "quick",
    "workers",
    "checkpoint_every",
    "output",
    "dry_run",
    "export",
}


class RunFolder:
    """Locked from :meth:`take` on for as long as it is entered.

    :meth:`take` changes nothing that is there and :meth:`begin` does, so that data and teacher can
    be looked at in between.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path: Path = options.output
        self.lock: int | None = None
        self.chosen = {
            name: str(value.absolute()) if isinstance(value, Path) else value
            for name, value in sorted(vars(options).items())
            if name not in FREE
        }

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def take(self) -> str:
        """`"new"`, `"unfinished"` or `"finished"`: what is to be gone on with here, if anything."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_it()
        except OSError as error:
            raise JobError(f"--output {self.path}: {error.strerror}") from error
        self.refuse_to_overwrite_what_is_given()
        before = self.read_config()
        if before is None:
            foreign = [name for name in WRITTEN if os.path.lexists(self.path / name)]
            if foreign:
                raise JobError(
                    f"--output {self.path} holds {foreign[0]}, but no run of this job: "
                    "choose another folder"
                )
            if self.options.resume:
                print(f"no run in {self.path} to go on with: starting one")
            return "new"
        finished = (self.path / RESULTS).exists()
        if self.options.resume or restarted(before):
            self.compare(before["options"])
            return "finished" if finished else "unfinished"
        if self.options.overwrite:
            return "new"
        if finished:
            raise JobError(
                f"{self.path} holds a finished run: choose another --output, or give --overwrite "
                "to replace it"
            )
        raise JobError(
            f"{self.path} holds an unfinished run: go on with --resume, choose another --output, "
            "or give --overwrite to replace it"
        )

    def begin(self, read: dict[str, Content]) -> None:
        """Removes the run before, if there is one, and notes this one's options and data."""
        for name in WRITTEN:
            # The old configuration goes last, as the new one takes its place.
            if name != CONFIG and not self.is_given(name):
                (self.path / name).unlink(missing_ok=True)
        launch = os.environ.get("TORCHELASTIC_RUN_ID")
        content = {"job": JOB, "launch": launch, "options": self.chosen, "read": read}
        self.write(CONFIG, json.dumps(content, indent=2))

    def write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as file:
            file.write(f"{text}\n".encode())

    def is_given(self, name: str) -> bool:
        """Whether the file is the named teacher, which is not the job's to replace."""
        return same(self.path / name, self.options.teacher)

    def refuse_to_overwrite_what_is_given(self) -> None:
        """But for a given `teacher.pt`, in whose place nothing need be written."""
        for option in GIVEN:
            file: Path | str | None = getattr(self.options, option)
            for name in WRITTEN:
                if same(self.path / name, file) and (option, name) != ("teacher", "teacher.pt"):
                    raise JobError(
                        f"--{option.replace('_', '-')} must be no file that the run would write, "
                        f"got {file}: choose another --output, or copy the file"
                    )

    def read_config(self) -> dict[str, Any] | None:
        file = self.path / CONFIG
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise JobError(
                f"{file} cannot be read ({error}): move the folder away, or choose another --output"
            ) from error
        ours = isinstance(content, dict) and content.get("job") == JOB
        return content if ours and isinstance(content.get("options"), dict) else None

    def compare(self, before: dict[str, Any]) -> None:
        unknown = [f"--{k.replace('_', '-')}" for k in self.chosen if k not in before]
        if unknown:
            raise JobError(
                f"--resume wants a run of this version of the job, got one in {self.path} that has "
                f"no {', '.join(unknown)}: choose another --output, or give --overwrite instead"
            )
        changed = [k for k, v in self.chosen.items() if before[k] != v]
        if changed:
            raise JobError(
                f"--resume must keep the settings of the run in {self.path}, got "
                + ", ".join(f"{k}={self.chosen[k]} for {before[k]}" for k in changed)
            )

    def compare_read(self, now: dict[str, Content]) -> None:
        """Of a run that has noted nothing, being older, nothing is asked."""
        before: dict[str, Content] = (self.read_config() or {}).get("read", {})
        changed = [name for name, content in now.items() if before.get(name, content) != content]
        if changed:
            raise JobError(
                f"--resume must keep what the run in {self.path} has read, got "
                + ", ".join(other(name, now[name][0], before[name][0]) for name in changed)
                + ": give back what was there, choose another --output, or give --overwrite instead"
            )

    def lock_it(self) -> None:
        """The kernel takes the lock back when the process ends, whatever ends it."""
        if fcntl is None:
            return
        self.lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Of the process: the data loader's do not inherit it.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise JobError(
                f"another process is at work in {self.path}: await it, or choose another --output"
            ) from error
        except OSError as error:
            print(f"{self.path} knows no locks ({error.strerror}): start no second job in it")


def other(name: str, now: str, before: str) -> str:
    return f"other {name}" + (f" ({now:.100} for {before:.100})" if now != before else "")


def same(file: Path, named: Path | str | None) -> bool:
    # Weights may be named by a word.
    if not isinstance(named, Path):
        return False
    return file.exists() and named.exists() and file.samefile(named)


def restarted(before: dict[str, Any]) -> bool:
    """Whether torchrun has started the processes again, since one of those that began it died."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and before.get("launch") == os.environ.get("TORCHELASTIC_RUN_ID")
