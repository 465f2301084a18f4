"""What the path of a tap names in a model, wrapped or not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn
from torch.jit._script import RecursiveScriptModule

Layers = Sequence[str] | Mapping[str, str]

# DDP and AveragedModel, torch.compile, FSDP and activation checkpointing, in this order.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PATH = re.compile(r"(?P<module>[^\[\]:]*)(?P<input>:input)?(?P<keys>(\[[^\[\]]+\])*)")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def require_module(name: str, module: object) -> None:
    if not isinstance(module, nn.Module) or isinstance(module, nn.DataParallel):
        raise TypeError(
            f"`{name}` must be an nn.Module other than nn.DataParallel (use "
            f"DistributedDataParallel), got {type(module).__name__}."
        )


def innermost(model: nn.Module) -> nn.Module:
    """The model itself, out of all its wrappers."""
    require_module("model", model)
    return _own_names(model)[""][-1]


def _own_names(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules by the name that they have without wrappers, which come before what they wrap.

    A wrapper has one child, called as wrappers call it: a model's own `module` has siblings.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    own_names: dict[str, str] = {}
    found: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if not name:
            own = ""
        elif last in _WRAPPERS and len(modules[parent]._modules) == 1:
            own = own_names[parent]
        else:
            own = f"{own_names[parent]}.{last}".removeprefix(".")
        own_names[name] = own
        found.setdefault(own, []).append(module)
    return found


def require_in_both(
    name: str, paths: tuple[str, str], student: nn.Module, teacher: nn.Module
) -> None:
    """The paths of a level name a module of the student and one of the teacher."""
    sides = ("student", student), ("teacher", teacher)
    advice = "a (student path, teacher path) pair names both"
    if paths[0] != paths[1]:
        advice = "the student comes first, in each pair and before the teacher"
    for (role, model), path, (other, elsewhere) in zip(sides, paths, sides[::-1], strict=True):
        resolve(model, path, name, f"{role}, a ", (f", a path of the {other}: {advice}", elsewhere))


def resolve(
    model: nn.Module,
    path: str,
    name: str,
    role: str = "",
    other: tuple[str, nn.Module] | None = None,
) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """The module that `path` names, whether its input is meant, and the item's keys.

    An error says the model's `role`, and the advice where the `other` model has such a module.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(
            f"`{name}` must be a module's name, then ':input' and '[item]' if wanted, got {path!r}."
        )
    keys = tuple(key.strip("'\"") for key in re.findall(r"\[([^\[\]]+)\]", match["keys"]))
    wanted = match["module"]
    found = _named(model, wanted)
    if not found:
        own_names = _own_names(model)
        # What wraps a model, such as PEFT, puts its own names in front.
        behind = [own for own in own_names if own.endswith(f".{wanted}")][:3]
        close = behind or difflib.get_close_matches(wanted, own_names)
        hint = f" (close: {', '.join(map(repr, close))})" if close else ""
        if other is not None and _named(other[1], wanted):
            hint += other[0]
        raise ValueError(
            f"`{name}` must be the path of a module of the {role}{type(model).__name__}, "
            f"got {wanted!r}{hint}."
        )
    return found[0], match["input"] is not None, keys


def _named(model: nn.Module, wanted: str) -> list[nn.Module]:
    """The modules that a path names, from the outermost wrapper to what is wrapped."""
    own_names = _own_names(model)
    if wanted in own_names:
        return own_names[wanted]
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if wanted in modules:
        return [modules[wanted]]
    return own_names.get(_without_wrappers(wanted), [])


def require_in_place(model: nn.Module, path: str, name: str, module: nn.Module) -> None:
    """The path of a tap still names the module that was tapped, or none."""
    wanted = re.split(r"[\[:]", path)[0]
    # Nearly always; the names of all modules take a thousand times longer.
    found: nn.Module | None = model
    for part in wanted.split(".") if wanted else ():
        while found is not None and part not in found._modules:
            found = _wrapped(found)
        if found is not None:  # not `and`: a compiled module's truth is its length, and it has none
            found = found._modules[part]
    while found is not None and found is not module:
        found = _wrapped(found)
    if found is module:
        return
    named = _named(model, wanted)
    if module in named or (not named and module in set(model.modules())):
        return
    found_now = _kind(named[0]) if named else "nothing"
    raise RuntimeError(
        f"`{name}` must stay the module that was tapped, got {found_now} in place of "
        f"{_kind(module)} at {path!r}: it was replaced or wrapped, as by LoRA, a conversion or a "
        "quantisation. Make the tap (or the distiller) after that."
    )


def _kind(module: nn.Module) -> str:
    """With its package, since a replacement is often called as what it replaces."""
    return f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps."""
    if len(module._modules) != 1:
        return None
    ((name, child),) = module._modules.items()
    return child if name in _WRAPPERS else None


def require_called(model: nn.Module, path: str, name: str, module: nn.Module) -> None:
    """The module's hooks run: no traced, exported or scripted model holds it as a name alone."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    found = [own for own, value in modules.items() if value is module]
    graphs = [_graph_instead(modules, own) for own in found]
    if None in graphs:
        return
    graph = graphs[0] or ""
    called = _references(modules[graph], "call_module")
    parts = [f"{graph}.{call}".removeprefix(".") for call in called]
    parts = [part for part in parts if part.startswith(f"{found[0]}.")]
    hint = f", or a part that it calls, such as {parts[-1]!r}" if parts else ""
    raise ValueError(
        f"`{name}` must be a module whose hooks run, got {path!r} of a traced, exported or "
        f"scripted {type(modules[graph]).__name__}, which runs without it: tap the model that this "
        f"was made of{hint}."
    )


def _graph_instead(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """The graph around the module of this name that runs without its hooks and those around it."""
    if isinstance(modules[name], RecursiveScriptModule):
        return name
    parts = name.split(".")
    for depth in range(len(parts) if name else 0):
        around, inside = ".".join(parts[:depth]), ".".join(parts[depth:])
        holder = modules[around]
        if isinstance(holder, torch.jit.ScriptModule):
            return around
        if isinstance(holder, fx.GraphModule) and not any(
            f"{inside}.".startswith(f"{target}.")
            for target in _references(holder, "call_module", "get_attr")
        ):
            return around
    return None


def _references(module: nn.Module, *operations: str) -> list[str]:
    """What its graphs, of which torchvision's have one for training and one for eval, refer to."""
    graphs = (value for value in vars(module).values() if isinstance(value, fx.Graph))
    return [str(node.target) for graph in graphs for node in graph.nodes if node.op in operations]


def pair_of(name: str, path: object) -> tuple[str, str]:
    """A path in both models, or one each."""
    if isinstance(path, str):
        return path, path
    if isinstance(path, tuple | list) and len(path) == 2 and all(isinstance(p, str) for p in path):
        return path[0], path[1]
    raise TypeError(
        f"`{name}` must be a path or a (student path, teacher path) pair, got {path!r}."
    )


def require_layers(layers: Layers) -> dict[str, str]:
    """Alias -> path, checked by kind."""
    if isinstance(layers, str) or not isinstance(layers, Sequence | Mapping):
        found = type(layers).__name__
        raise TypeError(f"`layers` must be a list of paths or a mapping to paths, got {found}.")
    pairs = list(layers.items()) if isinstance(layers, Mapping) else [(p, p) for p in layers]
    for alias, path in pairs:
        if not isinstance(alias, str) or not isinstance(path, str):
            raise TypeError(f"`layers` must hold strings, got {alias!r}: {path!r}.")
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ValueError(f"`layers` must hold at least one path, each once, got {list(layers)}.")
    return dict(pairs)
