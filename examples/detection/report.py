"""What a finished job leaves to look at: a table, the results as JSON, and three pictures."""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torchvision
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import nms

import featkd
from examples.detection.batches import collate
from examples.detection.checkpoints import Curve
from examples.detection.run_folder import PICTURES, RESULTS, WEIGHTS, RunFolder
from examples.detection.training import METRICS

TITLES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
TEMPERATURES = (0.5, 1.0, 4.0, 16.0)
SURE = 0.4  # the score of what is drawn
COLOURS = {"teacher": "tab:gray", "plain": "tab:blue", "distilled": "tab:orange"}


def table(runs: dict[str, Curve]) -> str:
    """Held-out metrics of each run's last evaluation, and what distillation changes."""
    final = {name: curve.evaluations[-1][1] for name, curve in runs.items()}
    # The evaluator says -1 where no held-out object has the size.
    present = {m for m in METRICS if final["plain"][m] >= 0}
    rows = [("", *TITLES)]
    for name, metrics in final.items():
        rows.append((name, *(f"{metrics[m]:.3f}" if m in present else "-" for m in METRICS)))
    gains = {m: final["distilled"][m] - final["plain"][m] for m in METRICS}
    rows.append(
        ("distilled - plain", *(f"{gains[m]:+.3f}" if m in present else "-" for m in METRICS))
    )
    return "\n".join("  ".join([row[0].ljust(17), *(c.rjust(6) for c in row[1:])]) for row in rows)


def write_report(
    options: argparse.Namespace,
    folder: RunFolder,
    runs: dict[str, Curve],
    models: dict[str, nn.Module],
    layers: dict[str, tuple[str, str]],
    held_out: Dataset[Any],
    classes: tuple[str, ...],
    device: torch.device,
) -> None:
    mpl.use("Agg")
    curves, attention, detections = (folder.path / name for name in PICTURES)
    images, targets = collate([held_out[i] for i in range(min(4, len(held_out)))])
    plot_curves(runs, curves)
    ours, theirs = next(iter(layers.values()))
    paths = {"teacher": theirs, "plain": ours, "distilled": ours}
    plot_attention(models, images[0], paths, device, attention)
    plot_detections(models, images, targets, classes, device, detections)
    results = {
        "options": vars(options),
        "versions": {
            "featkd": featkd.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "classes": classes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "runs": {name: vars(curve) for name, curve in runs.items()},
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
    }
    # Last of all: it says that the run is finished.
    folder.write(RESULTS, json.dumps(results, indent=1, default=str))
    print()
    print(table(runs))
    print(f"\n{RESULTS}, {', '.join((*PICTURES, *WEIGHTS.values()))} are in {folder.path}")


def plot_curves(runs: dict[str, Curve], file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("plain", "distilled"):
        losses = torch.tensor(runs[name].losses)
        window = max(1, len(losses) // 30)
        smooth = losses.unfold(0, window, 1).mean(1)
        left.plot(range(window, len(losses) + 1), smooth, color=COLOURS[name], label=name)
        steps, metrics = zip(*runs[name].evaluations, strict=True)
        right.plot(steps, [m["map"] for m in metrics], "o-", color=COLOURS[name], label=name)
    last = runs["teacher"].evaluations[-1][1]["map"]
    right.axhline(last, color=COLOURS["teacher"], linestyle=":", label="teacher")
    left.set(xlabel="step", ylabel="detector's loss", title="training (moving average)")
    right.set(xlabel="step", ylabel="AP", title="held-out images", ylim=(0, None))
    left.legend()
    right.legend()
    save(figure, file)


@torch.no_grad()
def plot_attention(
    models: dict[str, nn.Module],
    image: Tensor,
    paths: dict[str, str],
    device: torch.device,
    file: Path,
) -> None:
    """Each model's spatial attention mask over an image, sharper from right to left (figure 4)."""
    columns = 1 + len(TEMPERATURES)
    figure, axes = plt.subplots(
        len(models), columns, figsize=(2.2 * columns, 2.2 * len(models)), layout="constrained"
    )
    height, width = image.shape[-2:]
    for row, (name, model) in zip(axes, models.items(), strict=True):
        with featkd.FeatureTap(model.eval(), [paths[name]]) as tap:
            model([image.to(device)])
            attention = featkd.spatial_attention(tap.pop()[paths[name]])
        show(row[0], image)
        row[0].set_ylabel(name)
        grey = image.mean(0, keepdim=True).expand_as(image)
        for axis, temperature in zip(row[1:], TEMPERATURES, strict=True):
            none = torch.zeros_like(attention)
            mask = featkd.attention_mask(attention, none, temperature=temperature)[0].cpu()
            show(axis, grey)
            axis.imshow(
                mask.numpy(), extent=(0, width, height, 0), alpha=0.6, cmap="inferno", vmin=0
            )
            axis.set_title(f"T = {temperature:g}, max {mask.max():.1f}", fontsize=8)
    save(figure, file)


@torch.no_grad()
def plot_detections(
    models: dict[str, nn.Module],
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    classes: tuple[str, ...],
    device: torch.device,
    file: Path,
) -> None:
    """The truth and each model's detections of at least 0.4, the best class of each place."""
    found = {"truth": targets}
    for name, model in models.items():
        results = model.eval()([image.to(device) for image in images])
        found[name] = [best_of_each_place(result) for result in results]
    size = (2.6 * len(images), 2.6 * len(found))
    figure, axes = plt.subplots(
        len(found), len(images), figsize=size, layout="constrained", squeeze=False
    )
    for row, (name, results) in zip(axes, found.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, image, result in zip(row, images, results, strict=True):
            show(axis, image)
            if not len(result["boxes"]):
                axis.set_xlabel("no object" if name == "truth" else f"no box of {SURE} or more")
            scores = [f" {score:.2f}" for score in result.get("scores", [])]
            texts = scores or [""] * len(result["labels"])
            for box, label, text in zip(result["boxes"], result["labels"], texts, strict=True):
                draw(axis, box.tolist(), classes[int(label)] + text, int(label))
    save(figure, file)


def best_of_each_place(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's own suppression is by class: a place may hold a box of each."""
    sure = {key: value[result["scores"] >= SURE] for key, value in result.items()}
    kept = nms(sure["boxes"], sure["scores"], 0.5)
    return {key: value[kept] for key, value in sure.items()}


def show(axis: Axes, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set(xticks=[], yticks=[])


def draw(axis: Axes, box: list[float], text: str, label: int) -> None:
    left, top, right, bottom = box
    colour = f"C{label}"
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.2)
    )
    # A user's class may have a dollar in its name.
    style = {"fontsize": 6, "color": "white", "va": "bottom", "parse_math": False}
    axis.text(left, top, text, backgroundcolor=colour, **style)


def save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)
