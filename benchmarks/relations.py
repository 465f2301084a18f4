"""Time, peak memory and growth of the four relations, against the matrix of all pairs.

    python -m benchmarks.relations [--device cuda] [--quick]

Where `mmcv-lite` is installed its `NonLocal2d` is timed too, forward only: in concatenation mode
its backward raises an error.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import featkd
from benchmarks import plain
from benchmarks.measure import arguments, peak_bytes, record, seconds, spread

POSITIONS = (25, 70, 273, 1024, 2048, 4096, 8192, 16384, 32768, 60800)
# Exact softmax attention is quadratic in time.
GAUSSIAN_POSITIONS = (25, 70, 273, 1024, 2048, 4096, 60800)
TINY = (64, 128)
MATRIX_POSITIONS = 4096
WIDTH = 128
IMAGES = 2
SLOW = 10.0  # seconds: timed once
FITTED = (4000, 33000)
Relation = Callable[..., Tensor]
# As featkd has it, and with the matrix of all pairs.
KINDS: dict[str, tuple[Relation, Relation]] = {
    "dot_product": (featkd.dot_product_relation, partial(plain.relation, "dot_product")),
    "concatenation": (featkd.concatenation_relation, partial(plain.relation, "concatenation")),
    "embedded_gaussian": (
        featkd.embedded_gaussian_relation,
        partial(plain.relation, "embedded_gaussian"),
    ),
    "gaussian": (featkd.gaussian_relation, lambda x, g: plain.relation("gaussian", x, x, g)),
}


def inputs(kind: str, positions: int, device: torch.device) -> list[Tensor]:
    """theta, phi and g; for the gaussian the features and g."""
    widths = {"concatenation": (1, 1, WIDTH), "gaussian": (WIDTH, WIDTH)}
    scale = WIDTH**-0.25 if kind.endswith("gaussian") else 1.0
    return [
        (scale * torch.randn(IMAGES, width, positions, device=device)).requires_grad_()
        for width in widths.get(kind, (WIDTH, WIDTH, WIDTH))
    ]


def both_ways(
    relation: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(relation(*tensors), tensors, gradient)


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log time over log positions, by least squares, within `FITTED`."""
    points = [
        (math.log(row["positions"]), math.log(row["ms"]))
        for row in rows
        if FITTED[0] <= row["positions"] <= FITTED[1]
    ]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return covariance / sum((x - mean_x) ** 2 for x, _ in points)


def row(
    kind: str, form: str, positions: int, run: Callable[[], object], device: torch.device
) -> dict[str, Any]:
    start = time.perf_counter()
    peak = peak_bytes(run, device)
    once = time.perf_counter() - start
    times = [once] if once > SLOW else seconds(run, device, budget=1.0)
    found = spread(times)
    return {
        "kind": kind,
        "form": form,
        "positions": positions,
        "ms": 1e3 * found["median"],
        "ms_p25": 1e3 * found["p25"],
        "ms_p75": 1e3 * found["p75"],
        "runs": len(times),
        "MiB": peak / 2**20,
    }


def measure(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    for kind, (ours, matrix) in KINDS.items():
        slow = kind.endswith("gaussian") and device.type == "cpu"
        for positions in TINY if quick else GAUSSIAN_POSITIONS if slow else POSITIONS:
            tensors = inputs(kind, positions, device)
            gradient = torch.randn(IMAGES, WIDTH, positions, device=device)
            run = both_ways(ours, tensors, gradient)
            yield row(kind, "featkd", positions, run, device)
            if positions <= MATRIX_POSITIONS:
                run = both_ways(matrix, tensors, gradient)
                yield row(kind, "matrix", positions, run, device)
    if find_spec("mmcv") is not None:
        yield from measure_mmcv(device)


def measure_mmcv(device: torch.device) -> Iterator[dict[str, Any]]:
    """mmcv's `NonLocal2d` and our block of the same kind, forward only."""
    from mmcv.cnn import NonLocal2d

    features = torch.randn(1, 2 * WIDTH, 32, 48, device=device)
    for kind in ("dot_product", "concatenation", "embedded_gaussian", "gaussian"):
        blocks = {
            "featkd block, forward": featkd.NonLocalRelation(2 * WIDTH, kind=kind, residual=True),
            "mmcv block, forward": NonLocal2d(2 * WIDTH, reduction=2, mode=kind, use_scale=False),
        }
        for form, block in blocks.items():
            run = torch.no_grad()(partial(block.to(device), features))
            yield row(kind, form, 32 * 48, run, device)


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = measure(options.device, options.quick)
    columns = {"kind": "", "form": "", "positions": "", "ms": ".2f", "MiB": ".1f"}
    rows = record("relations", options.device, rows, columns, options.results)
    if options.quick:
        return
    for kind in ("dot_product", "concatenation"):
        ours = [row for row in rows if row["kind"] == kind and row["form"] == "featkd"]
        matrix = [row for row in rows if row["kind"] == kind and row["form"] == "matrix"][-1]
        same = next(row for row in ours if row["positions"] == matrix["positions"])
        print(
            f"{kind}: time grows as positions ** {exponent(ours):.2f} from 4,096 to 32,768; "
            f"{matrix['ms'] / same['ms']:.1f} times as fast as the matrix at {same['positions']}"
        )


if __name__ == "__main__":
    main()
