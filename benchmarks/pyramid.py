"""A whole pyramid with its adapters, forward and backward: the presets against plain torch.

python -m benchmarks.pyramid [--device cuda] [--no-compile] [--busy] [--quick]
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import featkd
from benchmarks import plain
from benchmarks.measure import arguments, busy, interleaved, peak_bytes, record, spread

Maps = dict[str, Tensor]
Sizes = tuple[tuple[int, int], ...]
Level = Callable[[nn.ModuleDict, Tensor, Tensor], Tensor]

# Images in the batch, channels, and H x W of P3 to P7.
BATCHES = {
    "8 x 320 x 320": (8, 256, ((40, 40), (20, 20), (10, 10), (5, 5), (3, 3))),
    "2 x 800 x 1216": (2, 256, ((100, 152), (50, 76), (25, 38), (13, 19), (7, 10))),
}
# One level, of which a call takes a few milliseconds or less: many calls, not compiled.
SMALL = {
    "8 x 256 x 13 x 21": (8, 256, ((13, 21),)),
    "2 x 64 x 24 x 24": (2, 64, ((24, 24),)),
    "1 x 8 x 4 x 4": (1, 8, ((4, 4),)),
}
TINY = {"1 x 64 x 64": (1, 256, ((8, 8), (4, 4)))}
COLUMNS = {"batch": "", "preset": "", "form": "", "ms": ".2f", "times plain": ".2f"}
COLUMNS |= {"peak maps": ".2f"}


def correlation(layers: nn.ModuleDict, student: Tensor, teacher: Tensor) -> Tensor:
    def of(x: Tensor) -> Tensor:
        rest = x - x.mean((2, 3), keepdim=True)
        return rest / (rest.square().mean((2, 3), keepdim=True).sqrt() + 1e-6)

    adapted = layers["attention_masked"]["adapter"](student)
    return (of(adapted) - of(teacher)).square().mean() / 2


def standardized(layers: nn.ModuleDict, student: Tensor, teacher: Tensor) -> Tensor:
    return featkd.STANDARDIZED.beta * correlation(layers, student, teacher)


def transfer(layers: nn.ModuleDict, student: Tensor, teacher: Tensor) -> Tensor:
    adapters = layers["attention_transfer"]
    spatial = adapters["spatial_adapter"](student.abs().mean(1, True)) - teacher.abs().mean(1, True)
    channel = adapters["channel_adapter"](student.abs().mean((2, 3))) - teacher.abs().mean((2, 3))
    return spatial.flatten(1).norm(dim=1).mean() + channel.norm(dim=1).mean()


def masked(layers: nn.ModuleDict, student: Tensor, teacher: Tensor) -> Tensor:
    adapted = layers["attention_masked"]["adapter"](student)
    with torch.no_grad():
        masks = plain.masks(student, teacher, featkd.FPN_OUTPUTS.temperature)
    return plain.masked_energy(adapted, teacher, *masks).sqrt().mean()


def non_local(layers: nn.ModuleDict, student: Tensor, teacher: Tensor) -> Tensor:
    blocks = layers["non_local"]
    ours = blocks["adapter"](relation(blocks["student_relation"], student))
    with torch.no_grad():
        theirs = relation(blocks["teacher_relation"], teacher)
    return (ours - theirs).flatten(1).norm(dim=1).mean()


def relation(block: nn.ModuleDict, features: Tensor) -> Tensor:
    theta, phi, g = (block[name](features) for name in ("theta", "phi", "g"))
    return plain.relation(featkd.FPN_OUTPUTS.kind, theta, phi, g).reshape(g.shape)


def fpn_outputs(layers: nn.ModuleDict, student: Tensor, teacher: Tensor) -> Tensor:
    settings, given = featkd.FPN_OUTPUTS, (layers, student, teacher)
    total = settings.alpha * transfer(*given) + settings.beta * masked(*given)
    return total + settings.gamma * non_local(*given)


PRESETS: dict[str, Level] = {
    "STANDARDIZED": standardized,
    "FPN_OUTPUTS": fpn_outputs,
}


class Plain(nn.Module):
    """A formula at every level, with torch's own layers."""

    def __init__(self, formula: Level, channels: dict[str, int]) -> None:
        super().__init__()
        self.formula = formula
        self.levels = nn.ModuleDict({k: layers(width, width // 2) for k, width in channels.items()})

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        return sum(self.formula(self.levels[k], student[k], teacher[k]) for k in student)


def layers(channels: int, width: int) -> nn.ModuleDict:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({k: nn.Conv2d(channels, width, 1) for k in ("theta", "phi", "g")})

    terms = {
        "attention_transfer": {
            "spatial_adapter": nn.Conv2d(1, 1, 3, padding=1),
            "channel_adapter": nn.Linear(channels, channels),
        },
        "attention_masked": {"adapter": nn.Conv2d(channels, channels, 1)},
        "non_local": {
            "student_relation": block(),
            "teacher_relation": block(),
            "adapter": nn.Conv2d(width, width, 1),
        },
    }
    return nn.ModuleDict({term: nn.ModuleDict(modules) for term, modules in terms.items()})


def both(preset: str, channels: dict[str, int]) -> tuple[nn.Module, nn.Module]:
    """The preset written plainly and featkd's, with the same parameters."""
    loss = featkd.FeatureDistillationLoss(channels, channels, getattr(featkd, preset))
    plainly = Plain(PRESETS[preset], channels)
    for level, terms in plainly.levels.items():
        for term, modules in terms.items():
            if ours := getattr(loss, term):
                modules.load_state_dict(ours[level].state_dict())
    return plainly, loss


def step(loss: nn.Module, student: Maps, teacher: Maps) -> Callable[[], None]:
    leaves = [*loss.parameters(), *student.values()]

    def run() -> None:
        found = loss(student, teacher)
        (sum(found.values()) if isinstance(found, dict) else found).backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def adapters(loss: Plain, student: Maps, gradients: Maps) -> Callable[[], None]:
    """The convolutions alone, of which no form does without."""
    layers = [loss.levels[level]["attention_masked"]["adapter"] for level in student]
    leaves = [*student.values(), *(p for layer in layers for p in layer.parameters())]

    def run() -> None:
        outputs = [layer(x) for layer, x in zip(layers, student.values(), strict=True)]
        torch.autograd.backward(outputs, list(gradients.values()))
        for leaf in leaves:
            leaf.grad = None

    return run


def features(images: int, channels: int, sizes: Sizes, device: torch.device) -> tuple[Maps, Maps]:
    def maps() -> Maps:
        return {
            f"p{level}": torch.randn(images, channels, *size, device=device)
            for level, size in enumerate(sizes, start=3)
        }

    student, teacher = maps(), maps()
    return {level: x.requires_grad_() for level, x in student.items()}, teacher


def forms(
    preset: str, student: Maps, teacher: Maps, device: torch.device, compiled: bool
) -> dict[str, Callable[[], None]]:
    losses = both(preset, {level: x.shape[1] for level, x in student.items()})
    plainly, ours = (loss.to(device) for loss in losses)
    runs = {"plain": step(plainly, student, teacher)}
    if not compiled:
        runs["featkd"] = step(ours, student, teacher)
        runs["L_AM's adapters"] = adapters(plainly, student, teacher)
        return runs
    torch.compiler.reset()
    for name, loss in (("plain compiled", plainly), ("featkd compiled", ours)):
        runs[name] = step(torch.compile(loss, fullgraph=True), student, teacher)
    return runs


def measure(
    device: torch.device, quick: bool, compiled: bool, rounds: int
) -> Iterator[dict[str, Any]]:
    """The eager forms of all first: what is compiled takes its time."""
    for compiling in (False, True) if compiled else (False,):
        batches = TINY if quick else BATCHES if compiling else BATCHES | SMALL
        for preset, (batch, shape) in itertools.product(PRESETS, batches.items()):
            student, teacher = features(*shape, device)
            runs = forms(preset, student, teacher, device, compiling)
            found = interleaved(runs, device, 20 * rounds if batch in SMALL else rounds)
            times = {form: spread(t) for form, t in found.items()}
            size = sum(x.nbytes for x in teacher.values())
            plainly = times["plain"]["median"]
            for form in list(runs)[compiling:]:  # the eager plain form stands there already
                yield {
                    "batch": batch,
                    "preset": preset,
                    "form": form,
                    "ms": 1e3 * times[form]["median"],
                    "ms_p25": 1e3 * times[form]["p25"],
                    "ms_p75": 1e3 * times[form]["p75"],
                    "times plain": plainly / times[form]["median"],
                    "peak maps": peak_bytes(runs[form], device) / size,
                }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--busy", action="store_true", help="beside a process on every core")
    options = parser.parse_args()
    # Where others compute some calls take three times the median.
    rounds = 25 if options.busy else 9
    rows = measure(options.device, options.quick, not options.no_compile, rounds)
    name = "pyramid-busy" if options.busy else "pyramid"
    with busy() if options.busy else nullcontext():
        record(name, options.device, rows, COLUMNS, options.results)


if __name__ == "__main__":
    main()
