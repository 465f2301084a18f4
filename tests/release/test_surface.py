"""The public surface, frozen: every name, signature, default, choice and preset.

A change of it is a decision: `python -m tests.release.test_surface` writes the new one, and
CHANGELOG.md says why (see "What is promised" in CONTRIBUTING.md).
"""

import ast
import difflib
import inspect
import re
import textwrap
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_origin

import featkd
from featkd import functional, matching, report, testing

MODULES = (featkd, functional, matching, report, testing)
FROZEN = Path(__file__).with_name("public_surface.txt")
COMMAND = "python -m tests.release.test_surface"


def shown(value: object) -> str:
    """A value as text that is the same in every process and Python."""
    if isinstance(value, FunctionType):
        return value.__name__
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))},)"
    if isinstance(value, dict):
        return f"{{{', '.join(map(shown, value))}}}"
    return repr(value)


class Verbatim:
    """Prints as the text that it holds, where `inspect` would quote it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> str:
    found = inspect.signature(function)
    parameters = []
    for parameter in found.parameters.values():
        if isinstance(parameter.annotation, str):
            parameter = parameter.replace(annotation=Verbatim(parameter.annotation))
        if parameter.default is not parameter.empty:
            parameter = parameter.replace(default=Verbatim(shown(parameter.default)))
        parameters.append(parameter)
    returned = Verbatim(str(found.return_annotation))
    return str(found.replace(parameters=parameters, return_annotation=returned))


def aliases(function: Any) -> dict[str, str]:
    """What the names in a signature stand for, where they are no classes: `Literal` and unions."""
    home = vars(inspect.getmodule(function))
    names = re.findall(r"\b[A-Z]\w+", signature(function))
    return {name: repr(home[name]) for name in names if get_origin(home.get(name)) is not None}


def ours(cls: type) -> list[type]:
    """The class and those of its bases that are featkd's too."""
    return [base for base in cls.__mro__ if base.__module__.startswith("featkd")]


def functions_of(cls: type) -> dict[str, Any]:
    """The constructor and the public methods that featkd defines."""
    found = {name: value for base in reversed(ours(cls)) for name, value in vars(base).items()}
    own = {name: value for name, value in found.items() if isinstance(value, FunctionType)}
    return {name: own[name] for name in sorted(own) if name == "__init__" or name[0] != "_"}


def attributes_of(cls: type) -> set[str]:
    """Properties, fields and what the methods set on `self`."""
    trees = [ast.parse(textwrap.dedent(inspect.getsource(base))) for base in ours(cls)]
    found = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    found |= {name for name, value in vars(cls).items() if isinstance(value, property)}
    found |= set(getattr(cls, "__dataclass_fields__", ()))
    return {name for name in found if name[0] != "_"}


def entry(name: str, value: Any, known: dict[str, str]) -> list[str]:
    if isinstance(value, FunctionType):
        known |= aliases(value)
        return [f"{name}{signature(value)}"]
    if not isinstance(value, type):
        return [f"{name} = {shown(value)}"]
    lines = [f"class {name}({ours(value)[-1].__base__.__name__})"]
    for method, function in functions_of(value).items():
        known |= aliases(function)
        lines.append(f"    {method}{signature(function)}")
    if attributes := sorted(attributes_of(value)):
        lines.append(f"    attributes: {', '.join(attributes)}")
    return lines


def module_lines(module: ModuleType, known: dict[str, str]) -> list[str]:
    lines = [f"# {module.__name__}"]
    for name in module.__all__:
        value = getattr(module, name)
        if module is not featkd and getattr(featkd, name, None) is value:
            lines.append(f"{name}: featkd.{name}")
        else:
            lines += entry(name, value, known)
    return [*lines, ""]


def surface() -> str:
    known: dict[str, str] = {}
    lines = [line for module in MODULES for line in module_lines(module, known)]
    lines += ["# names in the signatures", *(f"{n} = {known[n]}" for n in sorted(known))]
    return "\n".join(lines) + "\n"


def test_the_public_surface_is_the_frozen_one():
    frozen, found = FROZEN.read_text(), surface()
    difference = difflib.unified_diff(
        frozen.splitlines(), found.splitlines(), FROZEN.name, "found", lineterm="", n=0
    )
    assert frozen == found, "\n".join(
        ["the public surface changed; where that is meant:", f"    {COMMAND}", *difference]
    )


if __name__ == "__main__":
    FROZEN.write_text(surface())
