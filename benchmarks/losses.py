"""Time and peak memory of L_AM and L_AT, forward and backward, against the plain formulas.

python -m benchmarks.losses [--device cuda] [--no-compile] [--quick]
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import featkd
from benchmarks import plain
from benchmarks.measure import arguments, interleaved, peak_bytes, record, spread

Loss = Callable[[Tensor, Tensor], Tensor]

SHAPES = (
    *((2, 256, 100, 152), (2, 256, 200, 304), (8, 256, 100, 152)),
    *((8, 256, 13, 21), (2, 64, 24, 24), (1, 8, 4, 4)),
)
TINY = ((2, 8, 10, 12),)
TEMPERATURE = 0.5
# Reads and writes of a whole feature map that the formulas need.
PASSES = {
    # forward: both maps, for the masks and for the loss; backward: both, and the gradient.
    "L_AM": 4 + 3,
    # forward: both maps; backward: the student's, and its gradient.
    "L_AT": 2 + 2,
    # one reading for masks and L_AT, one for L_AM; both backwards; the two gradients added: two
    # read, one written.
    "L_AM + L_AT": 4 + 3 + 2 + 3,
}


def without_adapters(loss: nn.Module) -> nn.Module:
    """The plain formulas have no adapters."""
    for parent in list(loss.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, nn.Identity())
    return loss


def plain_masked(student: Tensor, teacher: Tensor) -> Tensor:
    return plain.masked_loss(student, teacher, TEMPERATURE)


def plain_both(student: Tensor, teacher: Tensor) -> Tensor:
    return plain_masked(student, teacher) + plain.transfer_loss(student, teacher)


def ours_both(channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    settings = featkd.Hyperparameters(alpha=1.0, beta=1.0, gamma=0.0, temperature=TEMPERATURE)
    loss = without_adapters(
        featkd.FeatureDistillationLoss(channels, channels, hyperparameters=settings)
    )
    return lambda student, teacher: sum(loss(student, teacher).values())


def forms(channels: int) -> dict[str, tuple[Loss, Loss]]:
    """Each loss, written plainly and as featkd has it."""
    masked = featkd.AttentionMaskedLoss(channels, channels, temperature=TEMPERATURE)
    transfer = featkd.AttentionTransferLoss(channels, channels)
    return {
        "L_AM": (plain_masked, without_adapters(masked)),
        "L_AT": (plain.transfer_loss, without_adapters(transfer)),
        "L_AM + L_AT": (plain_both, ours_both(channels)),
    }


def step(loss: Loss, student: Tensor, teacher: Tensor) -> Callable[[], None]:
    def run() -> None:
        loss(student, teacher).backward()
        student.grad = None

    return run


def measure(device: torch.device, quick: bool, compiled: bool) -> Iterator[dict[str, Any]]:
    for shape in TINY if quick else SHAPES:
        student = torch.randn(shape, device=device, requires_grad=True)
        teacher = torch.randn(shape, device=device)
        target = torch.empty_like(teacher)
        size = teacher.numel() * teacher.element_size()
        for name, (plainly, ours) in forms(shape[1]).items():
            runs = {
                "copy": partial(target.copy_, teacher),
                "plain": step(plainly, student, teacher),
                "featkd": step(ours, student, teacher),
            }
            if compiled:
                torch.compiler.reset()
                runs["plain compiled"] = step(torch.compile(plainly), student, teacher)
                runs["featkd compiled"] = step(
                    torch.compile(ours, fullgraph=True), student, teacher
                )
            times = {form: spread(t) for form, t in interleaved(runs, device).items()}
            copy = times.pop("copy")["median"] / 2  # of one pass
            for form, time in times.items():
                yield {
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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    rows = measure(options.device, options.quick, not options.no_compile)
    columns = {"shape": "", "loss": "", "form": "", "ms": ".1f"}
    columns |= {"times plain": ".2f", "share of copy": ".0%", "peak maps": ".2f"}
    record("losses", options.device, rows, columns, options.results)


if __name__ == "__main__":
    main()
