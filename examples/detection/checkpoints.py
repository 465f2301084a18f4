"""Files of weights: written whole or not at all, and read with an error that says what to do."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from examples.detection.processes import JobError, by_first_rank, world


@dataclass
class Curve:
    """What one run leaves: losses by step, held-out metrics by step, and the time it took."""

    losses: list[float] = field(default_factory=list)
    distillation: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes `path`'s place once it is whole; an interrupt leaves the one before."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105
    # torch has an error of its own for what the file system refuses.
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        raise JobError(
            f"{path} cannot be written ({error!r:.150}): is the disk full? Mend it, and go on with "
            "--resume"
        ) from error


def write_atomically(path: Path, content: Any) -> None:
    with replacing(path) as file:
        torch.save(content, file)


def save(path: Path | None, parts: dict[str, Any], curve: Curve, step: int) -> None:
    """By the first rank alone."""
    if path is None or world()[0] > 0:
        return
    content: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    content |= {"curve": vars(curve), "step": step}
    write_atomically(path, content)


def load(path: Path | None, parts: dict[str, Any]) -> tuple[Curve, int]:
    """Goes on from the checkpoint, if there is one, whatever number of ranks has written it."""
    if path is None:
        return Curve(), 0
    advice = "remove it, and its training starts again"
    # One reader: another node's view of the file system may lag behind.
    content = by_first_rank(lambda: read(path, advice) if path.exists() else None)
    if content is None:
        return Curve(), 0
    try:
        for name, part in parts.items():
            part.load_state_dict(content[name])
        return Curve(**content["curve"]), content["step"]
    except Exception as error:
        raise JobError(f"{path} is no checkpoint of this model: {advice}") from error


def load_teacher(teacher: nn.Module, file: Path) -> None:
    """From a state dict, or from a checkpoint that holds one under `"model"`."""
    content = read_weights(file, "--teacher")
    try:
        teacher.load_state_dict(content)
    except Exception as error:
        first = str(error).splitlines()[-1].strip()
        raise JobError(f"--teacher {file} must fit --detector and the data: {first}") from error
    for name, value in teacher.state_dict().items():
        if not value.isfinite().all():
            raise JobError(f"--teacher {file} must hold finite weights, got others in {name}")


def read_weights(file: Path, option: str) -> Any:
    advice = f"{option} wants a state dict, or one under the key model, that torch.save has written"
    content = by_first_rank(lambda: read(file, advice))
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return content["model"]
    return content


def read(file: Path, advice: str) -> Any:
    # torchvision's reference scripts keep their arguments in a checkpoint.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file makes the unpickler raise anything.
    except Exception as error:
        raise JobError(f"{file} cannot be read ({type(error).__name__}): {advice}") from error
