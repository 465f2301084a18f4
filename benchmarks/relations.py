"""Time, peak memory and growth of the four relations, against the matrix of all pairs.

    python benchmarks/relations.py [--device cuda]

Where `mmcv-lite` is installed its `NonLocal2d` is timed too, forward only: in concatenation mode
its backward raises an error.
"""

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import plain
import torch
from measure import peak_bytes, seconds, spread, table, write
from torch import Tensor

import featkd

POSITIONS = (1024, 2048, 4096, 8192, 16384, 32768, 60800)
GAUSSIAN_POSITIONS = (1024, 2048, 4096)  # exact softmax attention stays quadratic in time
MATRIX_POSITIONS = 4096
WIDTH = 128
IMAGES = 2
FITTED = (4000, 33000)
KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dot_product": featkd.dot_product_relation,
    "concatenation": featkd.concatenation_relation,
    "embedded_gaussian": featkd.embedded_gaussian_relation,
}


def inputs(kind: str, positions: int, device: torch.device) -> list[Tensor]:
    width = 1 if kind == "concatenation" else WIDTH
    scale = WIDTH**-0.25 if kind == "embedded_gaussian" else 1.0
    return [
        (scale * torch.randn(IMAGES, channels, positions, device=device)).requires_grad_()
        for channels in (width, width, WIDTH)
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


def measure(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for kind, relation in KINDS.items():
        sizes = (
            GAUSSIAN_POSITIONS
            if kind == "embedded_gaussian" and device.type == "cpu"
            else POSITIONS
        )
        for positions in sizes:
            tensors = inputs(kind, positions, device)
            gradient = torch.randn(IMAGES, WIDTH, positions, device=device)
            forms: dict[str, Callable[..., Tensor]] = {"featkd": relation}
            if positions <= MATRIX_POSITIONS:
                forms["matrix"] = lambda *x, kind=kind: plain.relation(kind, *x)
            for form, function in forms.items():
                run = both_ways(function, tensors, gradient)
                time = spread(seconds(run, device, budget=1.0))
                rows.append(
                    {
                        "kind": kind,
                        "form": form,
                        "positions": positions,
                        "ms": 1e3 * time["median"],
                        "ms_p25": 1e3 * time["p25"],
                        "ms_p75": 1e3 * time["p75"],
                        "MiB": peak_bytes(run, device) / 2**20,
                    }
                )
    if find_spec("mmcv") is not None:
        rows += measure_mmcv(device)
    return rows


def measure_mmcv(device: torch.device) -> list[dict[str, Any]]:
    """`NonLocal2d` without its output convolution, and our block of the same kind, forward only."""
    from mmcv.cnn import NonLocal2d

    rows = []
    features = torch.randn(1, 2 * WIDTH, 32, 48, device=device)
    for kind in ("dot_product", "concatenation"):
        theirs = NonLocal2d(2 * WIDTH, reduction=2, mode=kind, use_scale=False).to(device)
        ours = featkd.NonLocalRelation(2 * WIDTH, kind=kind, residual=True).to(device)
        for form, block in (("featkd block, forward", ours), ("mmcv block, forward", theirs)):

            @torch.no_grad()
            def run(block: torch.nn.Module = block) -> Tensor:
                return block(features)

            time = spread(seconds(run, device, budget=1.0))
            rows.append(
                {
                    "kind": kind,
                    "form": form,
                    "positions": 32 * 48,
                    "ms": 1e3 * time["median"],
                    "ms_p25": 1e3 * time["p25"],
                    "ms_p75": 1e3 * time["p75"],
                    "MiB": peak_bytes(run, device) / 2**20,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    rows = measure(device)
    print(table(rows, {"kind": "", "form": "", "positions": "", "ms": ".2f", "MiB": ".1f"}))
    for kind in ("dot_product", "concatenation"):
        ours = [row for row in rows if row["kind"] == kind and row["form"] == "featkd"]
        matrix = [row for row in rows if row["kind"] == kind and row["form"] == "matrix"][-1]
        same = next(row for row in ours if row["positions"] == matrix["positions"])
        print(
            f"{kind}: time grows as positions ** {exponent(ours):.2f} from 4,096 to 32,768; "
            f"{matrix['ms'] / same['ms']:.1f} times as fast as the matrix at {same['positions']}"
        )
    print(write("relations", device, rows))


if __name__ == "__main__":
    main()
