"""Writes COMPATIBILITY.md from the results of the tests that are its cells.

    pytest tests/models/test_zoo.py --junitxml=zoo.xml
    .ci/mmdet VENV mmdet.xml
    .ci/ultralytics VENV ultralytics.xml
    python -m tests.helpers.matrix zoo.xml mmdet.xml ultralytics.xml

Each file is a section. A test `test_<column>[<model>]` is a cell, `test_cross_pair[<teacher> to
<student>]` a line of the pairs. The suite's properties hold the packages' versions, and under the
name of a cell that has no test the reason.
"""

import argparse
import re
from pathlib import Path
from xml.etree import ElementTree

# Module of tests -> the section's title, and the command that makes its file.
SECTIONS = {
    "test_zoo": (
        "Detectors of torchvision and Hugging Face, backbones of timm",
        "pytest tests/models/test_zoo.py --junitxml=zoo.xml",
    ),
    "test_mmdet": ("Detectors of mmdetection, student from teacher", ".ci/mmdet VENV mmdet.xml"),
    "test_ultralytics": (
        "YOLOs in Ultralytics' trainer, student from teacher",
        ".ci/ultralytics VENV ultralytics.xml",
    ),
}
# Column -> its heading, and what its tests hold.
COLUMNS = {
    "values": ("values", "a training step captures what plain hooks see, bit by bit"),
    "gradient": (
        "gradient",
        "the distillation losses alone reach the student's first weights and every adapter, and "
        "nothing behind the last tap",
    ),
    "teacher": (
        "teacher",
        "weights and buffers bit-equal after a step of the optimizer, no gradient, in `eval`",
    ),
    "distills": ("distills", "the framework's own training steps lower the distillation loss"),
    "state_dict": (
        "state dict",
        "keys and values as before, and no hook left when tap and distiller are gone",
    ),
    "export": (
        "export",
        "`torch.export` of the distilled backbone gives the program of one never tapped",
    ),
    "match_layers": ("`match_layers`", "finds the last stage of every stride, C1 to C5"),
    "compile_before_the_tap": (
        "compile before the tap",
        "a tap made after the first compiled call of a model of one stage is an error, not silence",
    ),
    "compile_after_the_tap": (
        "compile after the tap",
        "features and gradients of the uncompiled backbone",
    ),
    "checkpoint": (
        "checkpoint",
        "non-reentrant: features and gradients of the plain model; reentrant: an error",
    ),
    "functional_call": ("`functional_call`", "features and gradients of the weights passed"),
    "ema": ("EMA", "a running average of the student writes nothing into its tap"),
    "resume": ("resume", "a run that goes on from its checkpoint has the adapters saved there"),
    "nan_recovery": (
        "NaN",
        "the framework's recovery from a loss of NaN restores the adapters",
    ),
    "without_featkd": ("without featkd", "what is saved at the end loads where featkd is not"),
    "deepcopy": ("deepcopy", "the copy's hooks are inert, and it can be tapped itself"),
    "pickle": ("pickle", "likewise"),
    "amp": ("AMP", "a distillation step under bfloat16 autocast"),
    "channels_last": ("channels_last", "a distillation step; captures keep their layout"),
    "qat": ("QAT", "a distillation step with weights that were fake-quantized after the tap"),
    "lora": ("LoRA", "a frozen model whose first layer has a low-rank parametrization trains it"),
    "ddp": ("DDP", "gradients on two processes are the mean of those of each alone"),
    "fsdp2": ("FSDP2", "likewise"),
}
CELL = re.compile(r"test_(?P<column>\w+)\[(?P<model>.+)\]")
PAIRS = "cross_pair"
NO_TEST = "\N{EN DASH}"


def section(file: Path) -> str:
    suite = next(ElementTree.parse(file).iter("testsuite"))
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    versions = [f"{name} {value}" for name, value in properties.items() if "[" not in name]
    module = next(suite.iter("testcase")).get("classname").rpartition(".")[2]
    passed = results(suite)
    pairs = passed.pop(PAIRS, {})
    title, command = SECTIONS[module]
    lines = [
        f"## {title}",
        f"{suite.get('timestamp')[:10]}, {', '.join(versions)}; {count(passed, pairs)}. Made by:",
        f"```bash\n{command}\n```",
        cells(module, passed, properties),
    ]
    if pairs:
        rows = [[*pair.split(" to "), mark(passed)] for pair, passed in pairs.items()]
        lines.append(table(["teacher", "student", "values, gradient, teacher"], rows))
    return "\n\n".join(lines)


def results(suite: ElementTree.Element) -> dict[str, dict[str, bool]]:
    """Column -> model -> whether the test passed; a test that was skipped did not."""
    found: dict[str, dict[str, bool]] = {}
    for case in suite.iter("testcase"):
        if cell := CELL.fullmatch(case.get("name")):
            models = found.setdefault(cell["column"], {})
            models[cell["model"]] = models.get(cell["model"], True) and len(case) == 0
    return found


def cells(module: str, passed: dict[str, dict[str, bool]], reasons: dict[str, str]) -> str:
    """The table of models by columns, with a note for each reason why a cell has no test."""
    models = list(dict.fromkeys(model for column in passed.values() for model in column))
    notes: dict[str, str] = {}

    def cell(column: str, model: str) -> str:
        if model in passed[column]:
            return mark(passed[column][model])
        reason = reasons.get(f"test_{column}[{model}]")
        if not reason:
            return "not run"
        return f"{NO_TEST}[^{notes.setdefault(reason, f'{module}-{len(notes) + 1}')}]"

    columns = sorted(passed, key=lambda column: [*COLUMNS, column].index(column))
    headings = [COLUMNS[name][0] if name in COLUMNS else name.replace("_", " ") for name in columns]
    rows = [[f"`{model}`", *(cell(column, model) for column in columns)] for model in models]
    return "\n\n".join(
        [
            table(["", *headings], rows),
            *(f"[^{label}]: {reason}." for reason, label in notes.items()),
        ]
    )


def mark(passed: bool) -> str:
    return "✓" if passed else "✗"


def count(passed: dict[str, dict[str, bool]], pairs: dict[str, bool]) -> str:
    values = [value for column in [*passed.values(), pairs] for value in column.values()]
    return f"{sum(values)} of {len(values)} tests passed"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *[":-:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def legend() -> str:
    return "\n".join(f"- **{heading}**: {meaning}." for heading, meaning in COLUMNS.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes COMPATIBILITY.md from JUnit files.")
    parser.add_argument("results", nargs="+", type=Path, help="by pytest --junitxml, one a section")
    output = Path(__file__).parents[2] / "COMPATIBILITY.md"
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    names = " ".join(file.name for file in options.results)
    introduction = (
        "# What works with what\n\n"
        f"Written by `python -m tests.helpers.matrix {names}` from results of tests. ✓: the test "
        f"of this cell passed, ✗: it failed, {NO_TEST}: the model cannot do this without a tap "
        "either. All models have random weights."
    )
    sections = [introduction, legend(), *map(section, options.results)]
    options.output.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
