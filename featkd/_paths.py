"""What the path of a tap names in a model, wrapped or not."""

from __future__ import annotations

import difflib
import re

from torch import nn

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


def require_apart(name: str, module: nn.Module, teacher: nn.Module) -> None:
    """What is trained holds no weight or buffer of the teacher: training would change both."""
    held = {id(value) for value in (*teacher.parameters(), *teacher.buffers())}
    own = (*module.named_parameters(), *module.named_buffers())
    shared = [path for path, value in own if id(value) in held]
    if shared or module is teacher:
        found = "the same module" if module is teacher else f"{shared[0]!r} in both"
        raise ValueError(f"`teacher` must share no weights with `{name}`, got {found}.")


def require_synchronised(student: nn.Module, loss: nn.Module) -> None:
    """What averages the student's gradients over the processes averages the loss's too."""
    wrapper = next(filter(_averages_gradients, student.modules()), None)
    averaged = {
        id(value) for m in loss.modules() if _averages_gradients(m) for value in m.parameters()
    }
    left_out = [v for v in loss.parameters() if v.requires_grad and id(v) not in averaged]
    if wrapper is not None and left_out:
        found = type(wrapper).__name__
        raise ValueError(
            "`student` must not be wrapped by itself, as the parameters of `loss` would differ "
            f"from process to process, got {found}: wrap the distiller, `{found}(Distiller(...))`."
        )


def _averages_gradients(module: nn.Module) -> bool:
    wraps = isinstance(module, nn.parallel.DistributedDataParallel)
    return wraps or "_fsdp_wrapped_module" in module._modules


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
            own = f"{own_names[parent]}.{last}".lstrip(".")
        own_names[name] = own
        found.setdefault(own, []).append(module)
    return found


def resolve(model: nn.Module, path: str, name: str) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """The module that `path` names, whether its input is meant, and the item's keys."""
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(
            f"`{name}` must be a module's name, then ':input' and '[item]' if wanted, got {path!r}."
        )
    keys = tuple(key.strip("'\"") for key in re.findall(r"\[([^\[\]]+)\]", match["keys"]))
    wanted = match["module"]
    own_names = _own_names(model)
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if wanted in own_names:
        module = own_names[wanted][0]
    elif wanted in modules:
        module = modules[wanted]
    elif _without_wrappers(wanted) in own_names:
        module = own_names[_without_wrappers(wanted)][0]
    else:
        close = difflib.get_close_matches(wanted, own_names, n=3)
        hint = f" (close: {', '.join(map(repr, close))})" if close else ""
        raise ValueError(
            f"`{name}` must be the path of a module of the {type(model).__name__}, "
            f"got {wanted!r}{hint}."
        )
    return module, match["input"] is not None, keys


def pair_of(name: str, path: object) -> tuple[str, str]:
    """A path in both models, or one each."""
    if isinstance(path, str):
        return path, path
    if isinstance(path, tuple | list) and len(path) == 2 and all(isinstance(p, str) for p in path):
        return path[0], path[1]
    raise TypeError(
        f"`{name}` must be a path or a (student path, teacher path) pair, got {path!r}."
    )
