"""Time and peak memory of L_AM and L_AT, forward and backward, against the plain formulas.

python benchmarks/losses.py [--device cuda] [--no-compile]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import torch
from measure import interleaved, peak_bytes, spread, table, write
from torch import Tensor

import featkd

SHAPES = ((2, 256, 100, 152), (2, 256, 200, 304), (8, 256, 100, 152))
TEMPERATURE = 0.5
# Reads and writes of a whole feature map that the formulas need, each loss on its own.
PASSES = {
    # forward: both maps, for the masks and for the loss; backward: both, and the gradient.
    "L_AM": 4 + 3,
    # forward: both maps; backward: the student's, and its gradient.
    "L_AT": 2 + 2,
    # both, with the two gradients added: two read, one written.
    "L_AM + L_AT": 4 + 3 + 2 + 2 + 3,
}


def ours_masked(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        spatial = featkd.attention_mask(
            featkd.spatial_attention(student),
            featkd.spatial_attention(teacher),
            temperature=TEMPERATURE,
        )
        channel = featkd.attention_mask(
            featkd.channel_attention(student),
            featkd.channel_attention(teacher),
            temperature=TEMPERATURE,
        )
    return featkd.attention_masked_loss(
        student, teacher, spatial_mask=spatial, channel_mask=channel
    )


def plain_masked(student: Tensor, teacher: Tensor) -> Tensor:
    return plain.masked_loss(student, teacher, TEMPERATURE)


def plain_both(student: Tensor, teacher: Tensor) -> Tensor:
    return plain_masked(student, teacher) + plain.transfer_loss(student, teacher)


def ours_both(student: Tensor, teacher: Tensor) -> Tensor:
    return ours_masked(student, teacher) + featkd.attention_transfer_loss(student, teacher)


LOSSES = {
    "L_AM": (plain_masked, ours_masked),
    "L_AT": (plain.transfer_loss, featkd.attention_transfer_loss),
    "L_AM + L_AT": (plain_both, ours_both),
}


def step(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> Callable[[], None]:
    def run() -> None:
        loss(student, teacher).backward()
        student.grad = None

    return run


def measure(device: torch.device, compiled: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        student = torch.randn(shape, device=device, requires_grad=True)
        teacher = torch.randn(shape, device=device)
        target = torch.empty_like(teacher)
        size = teacher.numel() * teacher.element_size()
        for name, (plainly, ours) in LOSSES.items():
            runs = {
                "copy": partial(target.copy_, teacher),
                "plain": step(plainly, student, teacher),
                "featkd": step(ours, student, teacher),
            }
            if compiled:
                runs["featkd compiled"] = step(
                    torch.compile(ours, fullgraph=True), student, teacher
                )
            times = {form: spread(t) for form, t in interleaved(runs, device).items()}
            copy = times.pop("copy")["median"] / 2  # of one pass
            for form, time in times.items():
                rows.append(
                    {
                        "shape": " x ".join(map(str, shape)),
                        "loss": name,
                        "form": form,
                        "ms": 1e3 * time["median"],
                        "ms_p25": 1e3 * time["p25"],
                        "ms_p75": 1e3 * time["p75"],
                        "times plain": times["plain"]["median"] / time["median"],
                        "share of copy": PASSES[name] * copy / time["median"],
                        "peak maps": peak_bytes(runs[form], device) / size,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = measure(device, not options.no_compile)
    columns = {"shape": "", "loss": "", "form": "", "ms": ".1f"}
    columns |= {"times plain": ".2f", "share of copy": ".0%", "peak maps": ".2f"}
    print(table(rows, columns))
    print(write("losses", device, rows))


if __name__ == "__main__":
    main()
