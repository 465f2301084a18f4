"""Whether attention lies on the objects: of the teachers that `run` has trained, by tap.

python -m benchmarks.study attention

AUC: the probability that a position with its centre in a box has more spatial attention than one
outside of all boxes of the image; 0.5 where attention does not tell them apart, less where the
background has more. `centred`: attention of what a position's features differ by from the map's
mean, channel by channel (`masks="centred"` in `variants.py`). `rms`: the root mean square of
the features, which says what a temperature means.

Prints a table and writes `results/attention.json`.
"""

import argparse
import json
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import binary_auroc

import featkd
from benchmarks.measure import provenance
from benchmarks.study.lines import RESULTS
from benchmarks.study.plan import MAIN
from benchmarks.study.runs import Teacher, plain_run, teacher_of
from benchmarks.study.tables import table
from benchmarks.study.train import scenes, trained
from benchmarks.study.variants import centred, inside
from examples.detection.batches import collate, to_device
from examples.detection.detectors import fpn_outputs, levels_of

DETECTORS = ("faster_rcnn", "retinanet", "fcos")
MAPS = {
    "attention": featkd.spatial_attention,
    "centred": lambda features: featkd.spatial_attention(centred(features)),
}
COLUMNS = (*MAPS, "rms")


def auc(scores: Tensor, objects: Tensor) -> Tensor:
    """Of the scores' ranks: torchmetrics puts a sigmoid on what lies outside 0 to 1, and rounds."""
    values, ranks = scores.flatten().unique(return_inverse=True)
    return binary_auroc(ranks.double() / len(values), objects.flatten().long())


@torch.no_grad()
def measured(
    model: nn.Module, layers: list[str], data: Dataset[Any]
) -> dict[str, dict[str, float]]:
    """By tap the AUC of each kind of map, over the images with positions of both sorts, and rms."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    model.eval()
    with featkd.FeatureTap(model, layers) as tap:
        for batch in DataLoader(data, batch_size=16, collate_fn=collate):
            images, targets = to_device(batch, torch.device("cpu"))
            model(images)
            for layer, features in tap.pop().items():
                squares = found.setdefault(layer, {}).setdefault("rms", [])
                squares += features.square().mean(dim=(1, 2, 3))
                size = tuple(images[0].shape[-2:])
                sorts = [inside(each["boxes"], size, *features.shape[2:]) for each in targets]
                for name, attention in MAPS.items():
                    values = found[layer].setdefault(name, [])
                    values += [
                        auc(each, objects)
                        for each, objects in zip(attention(features), sorts, strict=True)
                        if objects.any() and not objects.all()
                    ]
    means = {
        layer: {name: float(torch.stack(values).mean()) for name, values in columns.items()}
        for layer, columns in found.items()
    }
    return {layer: columns | {"rms": sqrt(columns["rms"])} for layer, columns in means.items()}


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "attention",
        help="whether the trained teachers' attention lies on the objects",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="of `run`")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(command=write_attention)


def write_attention(options: argparse.Namespace) -> None:
    data = scenes(MAIN.held_out_seed, MAIN.held_out_images)
    found, body = {}, []
    for detector in DETECTORS:
        run = teacher_of(replace(plain_run(detector, 0, MAIN), teacher=Teacher()))
        teacher = trained(run, options.output)
        paths = [*levels_of(teacher), *fpn_outputs(teacher)]
        found[detector] = measured(teacher, paths, data)
        for layer, values in found[detector].items():
            body.append((detector, layer, *(f"{values[name]:.2f}" for name in COLUMNS)))
    content = {"provenance": provenance(torch.device("cpu")), "taps": found}
    (options.results / "attention.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table([("detector", "tap", *COLUMNS), *body]))
