"""What a release promises of the sources: safe loading, few imports, no network."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import featkd

ROOT = Path(__file__).parents[2]
PACKAGE = Path(featkd.__file__).parent
FOLDERS = ("featkd", "examples", "benchmarks", "tests", "docs")

# A whole module in memory, where a helper pickles one; its bytes were written a line before.
WHOLE_MODULES = {"tests/helpers/models.py": 1}


def sources():
    """The Python of the repository by file, and what its documents show."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()
    for path in sorted(ROOT.glob("*.md")):
        for block in re.findall(r"```py(?:thon)?\n(.*?)```", path.read_text(), re.DOTALL):
            yield path.name, block


def loads_without_weights_only(text):
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    safe = ("weights_only", "True")
    return [
        call for call in loads if safe not in [(k.arg, ast.unparse(k.value)) for k in call.keywords]
    ]


def test_every_checkpoint_is_loaded_with_weights_only():
    found = {}
    for file, text in sources():
        if calls := loads_without_weights_only(text):
            found[file] = found.get(file, 0) + len(calls)
    assert found == WHOLE_MODULES


@pytest.mark.parametrize("call", ["torch.load(f)", "torch.load(f, weights_only=False)"])
def test_a_load_without_weights_only_is_found(call):
    assert len(loads_without_weights_only(f"torch.load(f, weights_only=True), {call}")) == 1


def imported(text):
    """The packages that a file imports, at its top or inside; its own relative ones left out."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    return {name.partition(".")[0] for name in names}


def test_the_library_imports_torch_and_the_standard_library_alone():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        part = "testing" if path.parent.name == "testing" else "library"
        found.setdefault(part, set()).update(imported(path.read_text()) - sys.stdlib_module_names)
    assert found == {"library": {"torch"}, "testing": {"torch", "hypothesis"}}


OBSERVED = """
import sys

import torch

before = set(sys.modules)
events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)))
import featkd
import featkd.functional

after = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(after - sys.stdlib_module_names))
print([event for event in events if event[0].startswith(("socket.", "urllib.", "subprocess."))])
writes = [event for event in events if event[0] == "open" and event[1][2] & 3]
print(writes)
"""


def test_importing_opens_no_socket_starts_no_process_and_writes_no_file():
    command = [sys.executable, "-B", "-W", "error", "-c", OBSERVED]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    packages, connections, written = found.stdout.splitlines()
    assert packages == "['featkd']"
    assert connections == "[]"
    assert written == "[]"
