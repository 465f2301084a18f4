"""README and the guide: their code runs, prints what they say, and their links lead somewhere.

Of a page's blocks in order, with the names of `given`:

- `python` and `diff` (its new side) run;
- `text` right behind one is what it prints, to the last digits of a float;
- a first line `# From FILE` says where all its lines stand, and `# Not run: REASON` why it is only
  compiled.
"""

import math
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torchvision.models import detection

import featkd

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    *ROOT.glob("[A-Z]*[A-Z].md"),
    *ROOT.glob("tests/*.md"),
    *ROOT.glob("benchmarks/**/*.md"),
]
STOCK = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2")


class Block(NamedTuple):
    language: str
    code: str
    line: int
    prints: str | None
    """The `text` block right behind it."""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    pattern = r"^```(\w+)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?"
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        language, code, prints = match.groups()
        if language == "diff":
            lines = [line[1:] for line in code.splitlines() if not line.startswith("-")]
            code = "\n".join(lines)
        if language in ("diff", "python"):
            yield Block(language, code, text[: match.start()].count("\n") + 2, prints)


def stand_in(build: Any, weights: object = None, **options: Any) -> nn.Module:
    """The stock detector without its download, for small images."""
    return build(weights=None, weights_backbone=None, min_size=128, max_size=128, **options)


def given() -> dict[str, Any]:
    """What the pages take as the reader's own."""
    student, teacher = (getattr(detection, name)(weights="DEFAULT") for name in STOCK)
    layers = {"p3": "backbone[0]", "p4": "backbone[1]", "p5": "backbone[2]"}
    images = [torch.rand(3, 320, 320) for _ in range(2)]
    boxes = torch.tensor([[20.0, 20.0, 200.0, 300.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}] * 2
    return {
        "featkd": featkd,
        "torch": torch,
        "nn": nn,
        "student": student,
        "teacher": teacher,
        "layers": layers,
        "channels": dict.fromkeys(layers, 256),
        "images": images,
        "targets": targets,
        "loader": [(images, targets)],
        "device": "cpu",
    }


def same_word(said: str, found: str) -> bool:
    """Random weights' figures differ by a machine's rounding."""
    try:
        return said == found or math.isclose(
            float(said.rstrip(".")), float(found.rstrip(".")), rel_tol=0.02
        )
    except ValueError:
        return said == found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trainable_backbone_layers:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_runs_and_prints_what_the_page_says(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in STOCK:
        monkeypatch.setattr(detection, name, partial(stand_in, getattr(detection, name)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        program = compile("\n" * (block.line - 1) + block.code, page, "exec")
        first = block.code.partition("\n")[0]
        if first.startswith("# Not run: "):
            continue
        if first.startswith("# From "):
            source = (ROOT / first.removeprefix("# From ")).read_text()
            standing = {line.strip() for line in source.splitlines()}
            lines = [line.strip() for line in block.code.splitlines()[1:]]
            assert not [line for line in lines if line not in standing], where
            continue
        torch.manual_seed(0)
        names = names or given()
        with redirect_stdout(StringIO()) as printed:
            exec(program, names)
        if block.prints is not None:
            said, found = block.prints.split(), printed.getvalue().split()
            same = len(said) == len(found) and all(map(same_word, said, found))
            assert same, f"{where} prints\n{printed.getvalue()}"
    if "total" in names:
        assert names["total"].isfinite()


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST write them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(set(LINKED)), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_readme_is_one_page_with_code_in_its_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    assert "```diff" in lines[:14]


def test_no_block_of_python_goes_by_another_name() -> None:
    fences = re.findall(r"^```(.+)$", "".join(page.read_text() for page in PAGES), re.MULTILINE)
    tables_of_contents = {fence for fence in fences if fence.startswith("{")}
    assert set(fences) - tables_of_contents == {"python", "diff", "text", "bash", "bibtex"}
