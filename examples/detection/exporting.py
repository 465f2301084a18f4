"""The student as a program of `torch.export` or of ONNX, checked against the student itself."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import boxes as box_ops

from examples.detection.batches import collate
from examples.detection.checkpoints import replacing
from examples.detection.processes import JobError
from examples.detection.run_folder import EXPORTED

LOOKED_AT = 16  # held-out images among which those of the first one's size check the program
# Of the boxes: where two overlap by just the threshold, rounding chooses.
MOST_OTHERS = 0.01
Found = dict[str, Tensor]


def export(student: nn.Module, held_out: Dataset[Any], ways: Sequence[str], folder: Path) -> None:
    """In each of `ways`; where one fails the others are still tried."""
    failures = []
    for way in ways:
        try:
            print(exported(student, held_out, way, folder))
        except JobError as error:
            failures.append(str(error))
    if failures:
        raise JobError("\n".join(failures))


def exported(student: nn.Module, held_out: Dataset[Any], way: str, folder: Path) -> str:
    """Writes the file of `way` for images of the first held-out one's size, and says what it is."""
    images, _ = collate([held_out[i] for i in range(min(LOOKED_AT, len(held_out)))])
    alike = [image for image in images if image.shape == images[0].shape]
    model = copy.deepcopy(student).cpu().eval()
    name = EXPORTED[way]
    try:
        with quiet():
            content, takes, program = WAYS[way](model, alike[0])
            count, others = compared(model, program, alike)
    # Whatever an exporter meets in a detector.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"
        raise JobError(f"no {name}: {way} does not export this detector ({reason})") from error
    if others > MOST_OTHERS * count:
        raise JobError(f"no {name}: the exported program finds other boxes, {others} of {count}")
    with replacing(folder / name) as whole:
        whole.write(content)
    size = " x ".join(map(str, alike[0].shape))
    boxes = f"{count - others} of {count} boxes the same" if count else "neither finds a box"
    same = f"{boxes} on {len(alike)} images"
    return f"{folder / name}: takes {takes} {size}; {same}"


def by_torch(model: nn.Module, image: Tensor) -> tuple[bytes, str, Callable[[Tensor], Found]]:
    with mock.patch.object(box_ops, "batched_nms", suppressed):
        exported = torch.export.export(model, ([image],), strict=False)
    content, program = io.BytesIO(), exported.module()
    torch.export.save(exported, content)
    return content.getvalue(), "a list of one float image", lambda image: program([image])[0]


def by_onnx(model: nn.Module, image: Tensor) -> tuple[bytes, str, Callable[[Tensor], Found]]:
    # Of an extra.
    import onnxruntime

    names = list(model([image])[0])
    content = io.BytesIO()
    torch.onnx.export(
        model,
        ([image],),
        content,
        input_names=["image"],
        output_names=names,
        dynamic_axes={name: {0: "boxes"} for name in names},
        # The newer exporter takes ten times as long, and wants onnxscript.
        dynamo=False,
        opset_version=17,
    )
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])

    def program(image: Tensor) -> Found:
        found = map(torch.from_numpy, session.run(names, {"image": image.numpy()}))
        return dict(zip(names, found, strict=True))

    return content.getvalue(), "`image`, one float image", program


WAYS = {"torch": by_torch, "onnx": by_onnx}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of each line of a detector, and print the graph that they give up."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def suppressed(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """torchvision's batched_nms for any number of boxes; its own asks how many, and none exports.

    Classes are moved apart, so that their boxes do not overlap. Two boxes outside the picture come
    last and go again: torchvision tells torch.export that at least two are kept.
    """
    reach = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    apart = boxes + (classes.to(boxes) * reach)[:, None]
    outside = boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    scores = torch.cat([scores, scores.new_full((2,), -1)])
    return box_ops.nms(torch.cat([apart, outside]), scores, threshold)[:-2]


@torch.no_grad()
def compared(
    model: nn.Module, program: Callable[[Tensor], Found], images: list[Tensor]
) -> tuple[int, int]:
    """How many boxes there are, and how many of them are others."""
    counts, others = 0, 0
    for image in images:
        (ours,), theirs = model([image]), program(image)
        counts += max(len(found["boxes"]) for found in (ours, theirs))
        others += other_boxes(ours, theirs, 1e-3 * max(image.shape))
    return counts, others


def other_boxes(ours: Found, theirs: Found, pixels: float) -> int:
    """Boxes without one like them in the other results, wherever equal scores have put it."""
    alike = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(2) <= pixels
    alike &= (ours["scores"][:, None] - theirs["scores"]).abs() <= 1e-3
    alike &= ours["labels"][:, None] == theirs["labels"]
    return max(int((~alike.any(dim)).sum()) for dim in (0, 1))
