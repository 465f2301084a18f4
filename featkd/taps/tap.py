"""Forward-hook taps: the features at chosen modules of a model, which stays as it is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._checks import require_count, require_flag
from .hooks import (
    CallHook,
    ImageHook,
    InputHook,
    OutputHook,
    Store,
    in_place,
    move_last,
    remove_all,
)
from .layouts import Convert, PatchTokens, converted
from .paths import Layers, innermost, require_called, require_in_place, require_layers, resolve

T = TypeVar("T")


class FeatureTap:
    """Captures what chosen modules of a model put out (or take in) during a forward.

    Hooks are added once, here, and removed with :meth:`remove` or when the tap is no longer used;
    they capture only inside the `with` block. At its start they go behind the hooks of others, and
    so capture what a module hands on. Make the tap before the first call of a compiled model: a
    hook added later never fires there. The model's outputs and state dict are untouched, and its
    copies and saved files need no featkd. Use one tap in each thread.

    Args:
        model: any module; the wrappers of DDP, FSDP, `torch.compile`, checkpointing and EMA in a
            path can be left out.
        layers: a list of paths, or a mapping from alias to path. A path is a module's name as in
            `named_modules()`; where its output is no tensor, with the item to take: `"backbone[0]"`
            (position of a sequence, key of a mapping, attribute of anything else);
            `"backbone:input"` takes what goes in, `"head:input[1]"` or `"head:input[mask]"` one of
            several arguments.
        clone: copy what is captured. Without it an in-place operation behind the module (a
            `ReLU(inplace=True)`, `+=`) changes the capture: an error in eager mode, undetectable
            in a compiled model. What `inference_mode` puts out is copied nonetheless.
        calls: how often each alias's module runs in one forward where that is not once; its
            captures are named `alias[0]`, `alias[1]`, ...
        convert: for some aliases, a function that makes a feature map `(B, C, H, W)` of the capture
            at :meth:`pop`. That is :func:`featkd.from_channels_last`, or for tokens
            :class:`featkd.PatchTokens`, which takes the image's size from the model's call.

    Raises:
        TypeError: `model` is no module or is an `nn.DataParallel`, or `layers` not of its kind.
        ValueError: a path is malformed, unknown (with close matches), or of a module that a traced,
            exported or scripted model never calls.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> with FeatureTap(model, {"stem": "0"}) as tap:
        ...     _ = model(torch.randn(2, 3, 16, 16))
        ...     features = tap.pop()
        >>> features["stem"].shape
        torch.Size([2, 8, 14, 14])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        clone: bool = True,
        calls: Mapping[str, int] | None = None,
        convert: Mapping[str, Convert] | None = None,
    ) -> None:
        self.model = model
        self.layers = require_layers(layers)
        self.clone = clone
        self.calls = dict.fromkeys(self.layers, 1)
        require_flag("clone", clone)
        for alias, count in self._by_alias("calls", calls, "count").items():
            require_count(f"calls[{alias!r}]", count)
            self.calls[alias] = count
            for name in capture_names(alias, count):
                if name != alias and name in self.layers:
                    raise ValueError(
                        f"`layers` must hold no name of a capture of {alias!r}, got {name!r}."
                    )
        self.convert = self._by_alias("convert", convert, "function")
        for alias, function in self.convert.items():
            if not callable(function):
                found = type(function).__name__
                raise TypeError(f"`convert[{alias!r}]` must be callable, got {found}.")
        self._store = Store()
        self._outputs = set()
        root = innermost(model)
        found = {
            alias: resolve(model, path, f"layers[{alias!r}]") for alias, path in self.layers.items()
        }
        self._modules = {alias: module for alias, (module, _, _) in found.items()}
        for alias, module in self._modules.items():
            require_called(model, self.layers[alias], f"layers[{alias!r}]", module)
        tapped = set(self._modules.values())
        handles = [
            module.register_forward_pre_hook(CallHook(self._store))
            for module in root.modules()
            if module is root or not tapped.isdisjoint(set(module.modules()) - {module})
        ]
        for alias, (module, takes_input, keys) in found.items():
            path = self.layers[alias]
            if isinstance(self.convert.get(alias), PatchTokens):
                for around in model.modules():
                    if module in around.modules():
                        image = ImageHook(self._store, alias)
                        self._store.image_hooks.setdefault(alias, []).append(image)
                        handles.append(around.register_forward_pre_hook(image, with_kwargs=True))
            if takes_input:
                before = InputHook(self._store, alias, path, keys, clone)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                self._outputs.add(alias)
                after = OutputHook(self._store, alias, path, keys, clone)
                handles.append(module.register_forward_hook(after))
        self._handles = handles
        self._finalizer = weakref.finalize(self, remove_all, handles)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a tap taps the copy of its model.
        return _rebuild, (self.model, self.layers, self.clone, self.calls, self.convert)

    def __enter__(self) -> FeatureTap:
        if self._store.armed:
            raise RuntimeError("`with` must not be entered twice by one tap, got a tap in use.")
        self._store.clear()
        if torch.compiler.is_compiling():
            self._store.thread = None
        else:
            self._store.thread = threading.get_ident()
            move_last(self._handles)
        self._store.armed, self._store.popped = True, False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._store.armed = False
        if kind is not None:
            self._store.clear()

    def pop(self) -> dict[str, Tensor]:
        """The features of the last forward by alias; the tap lets go of them.

        Raises:
            RuntimeError: a module did not run as often as expected since the last pop, or was
                replaced or wrapped. A capture carries no gradient though the model's call recorded
                them, or was changed in place with `clone=False`.
        """
        captured, grad_enabled = self._store.captured, self._store.grad_enabled
        sizes = {
            alias: [self._store.image_size(alias, index) for index in range(len(found))]
            for alias, found in captured.items()
        }
        popped, self._store.popped = self._store.popped, True
        self._store.clear()
        if not torch.compiler.is_compiling():
            move_last(self._handles)
            for alias, module in self._modules.items():
                require_in_place(self.model, self.layers[alias], f"layers[{alias!r}]", module)
        features = {}
        frozen = {}
        for alias, expected in self.calls.items():
            found = captured.get(alias, [])
            if len(found) != expected:
                raise RuntimeError(self._miscount(alias, expected, len(found), popped))
            names = capture_names(alias, expected)
            for name, size, (feature, version) in zip(names, sizes[alias], found, strict=True):
                self._require_intact(alias, feature, version)
                learns = feature.requires_grad or not feature.is_floating_point()
                if alias in self._outputs and not learns:
                    frozen[name] = self.layers[alias]
                features[name] = converted(self.convert.get(alias), feature, size, alias)
        if frozen and grad_enabled and torch.is_grad_enabled():
            self._require_frozen_as_a_whole(frozen)
        return features

    def remove(self) -> None:
        """Take the hooks off the model; the tap captures nothing any more."""
        self._finalizer()

    def _by_alias(self, name: str, values: Mapping[str, T] | None, kind: str) -> dict[str, T]:
        """An argument for some aliases, checked by kind and names."""
        if not isinstance(values, Mapping | None):
            found = type(values).__name__
            raise TypeError(f"`{name}` must be a mapping from alias to {kind}, got {found}.")
        for alias in values or {}:
            if alias not in self.layers:
                aliases = list(self.layers)
                raise ValueError(f"`{name}` must name aliases of {aliases}, got {alias!r}.")
        return dict(values or {})

    def _miscount(self, alias: str, expected: int, found: int, popped: bool) -> str:
        path = self.layers[alias]
        since = " since the last `pop`, whose result is to be kept" if popped and not found else ""
        text = f"`pop` must follow {expected} call(s) of {path!r} (alias {alias!r}), got {found}"
        text += f"{since}: "
        if found > expected:
            return text + (
                "pop after every forward inside the `with` block; for a module that runs several "
                f"times in one forward pass `calls={{{alias!r}: {found}}}`."
            )
        if not in_place(self._handles):
            return text + "its hooks were taken off the model, make a new tap."
        return text + (
            "run the model itself, no traced or exported copy, inside the `with` block once before "
            "each pop, calling modules and not their `.forward`; a model compiled and called "
            "before the tap was made never calls its hooks: make the tap first, or call "
            "`torch.compiler.reset()`."
        )

    def _require_intact(self, alias: str, feature: Tensor, version: int | None) -> None:
        if version is not None and feature._version != version:
            raise RuntimeError(
                f"`layers[{alias!r}]` must stay as captured, got an in-place change behind "
                f"{self.layers[alias]!r}: use `clone=True`."
            )

    def _require_frozen_as_a_whole(self, frozen: dict[str, str]) -> None:
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RuntimeError(
                f"`layers` must carry a gradient each, got none at {frozen}: parameters are frozen "
                "(leave these levels out, here and in the loss), or they run under `no_grad`, "
                "`inference_mode` or reentrant checkpointing (take `use_reentrant=False`); call a "
                "teacher under `torch.no_grad()`."
            )


def capture_names(alias: str, count: int) -> list[str]:
    """What the captures of a module are called that runs so often in a forward."""
    return [alias] if count == 1 else [f"{alias}[{index}]" for index in range(count)]


def _rebuild(
    model: nn.Module,
    layers: dict[str, str],
    clone: bool,
    calls: dict[str, int],
    convert: dict[str, Convert],
) -> FeatureTap:
    return FeatureTap(model, layers, clone=clone, calls=calls, convert=convert)
