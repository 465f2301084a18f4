"""The hooks of a tap: they write to its store, which they know weakly."""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Masks are no image.
_PIXELS = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Store:
    """What the hooks of one tap write to."""

    def __init__(self) -> None:
        self.armed = False
        self.popped = False  # since it was armed
        self.thread: int | None = None
        # Alias -> what notes the images of its captures, from the model to the tapped module.
        self.image_hooks: dict[str, list[ImageHook]] = {}
        self.clear()
        # How often each alias is captured before the forward is left; None: it runs to its end.
        self.wanted: Mapping[str, int] | None = None

    def clear(self) -> None:
        self.grad_enabled = False
        # Alias -> (tensor, its version at the capture, None where it cannot have changed).
        self.captured: dict[str, list[tuple[Tensor, int | None]]] = {}
        for hooks in self.image_hooks.values():
            for hook in hooks:
                hook.seen = []

    def image_size(self, alias: str, index: int) -> tuple[int, int] | None:
        """The height and width of the image behind a capture.

        What enters a part of the model is the image, resized, where it has as many channels.
        """
        hooks = self.image_hooks.get(alias, [])
        seen = [image for hook in hooks for image in hook.seen if image[0] <= index]
        if not seen:
            return None
        latest = max([captures for captures, *_ in seen])
        sizes = [(image[1], image[2:]) for image in seen if image[0] == latest]
        return [size for channels, size in sizes if channels == sizes[0][0]][-1]

    def leave_if_complete(self) -> None:
        wanted = self.wanted or {}
        if all(len(self.captured.get(alias, ())) >= calls for alias, calls in wanted.items()):
            raise ForwardLeft(self)


class ForwardLeft(BaseException):
    """Ends a forward at the last capture wanted; `stopped_after_last_capture` catches it."""

    def __init__(self, store: Store) -> None:
        self.store = store


class _Hook:
    """Plain dict and list writes, which compile without a graph break."""

    def __init__(
        self,
        store: Store | None = None,
        alias: str = "",
        path: str = "",
        keys: tuple[str, ...] = (),
        clone: bool = True,
    ) -> None:
        self.store = None if store is None else weakref.ref(store)
        self.alias = alias
        self.path = path
        self.keys = keys
        self.clone = clone

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        """One that does nothing, and that compiles."""
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        # Does nothing and is Python's own: a saved model loads without featkd. The handle lifts
        # torch's count of hooks there, so that none gets this one's number and its options.
        handle = RemovableHandle(OrderedDict())
        return getattr, (nullcontext(handle), "__exit__")

    def _open_store(self, module: nn.Module) -> Store | None:
        store = None if self.store is None else self.store()
        if store is None or not store.armed:
            return None
        # Inside a backward this is activation checkpointing that runs the forward again.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return None
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "`model` must not run as replicas of nn.DataParallel, which share one tap between "
                f"threads, got one of a {type(module).__name__}: use DistributedDataParallel."
            )
        if not torch.compiler.is_compiling() and store.thread not in (None, threading.get_ident()):
            return None
        return store

    def _capture(self, store: Store, value: Any) -> None:
        for key in self.keys:
            value = _select(value, key, self.alias, self.path)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"`layers[{self.alias!r}]` must select a tensor, got {_describe(value)} at "
                f"{self.path!r}: append the item to take, such as '{self.path}[KEY]'."
            )
        version = None
        in_eager = not torch.compiler.is_compiling()
        # Of an inference tensor, which has no version, a change would not show.
        if self.clone or (in_eager and value.is_inference()):
            value = value.clone()
        elif in_eager:
            version = value._version
        store.captured.setdefault(self.alias, []).append((value, version))
        if in_eager and store.wanted is not None:
            store.leave_if_complete()


class OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        store = self._open_store(module)
        if store is not None:
            self._capture(store, output)


class InputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store = self._open_store(module)
        if store is None:
            return
        inputs = {str(index): value for index, value in enumerate(args)} | kwargs
        # One input needs no selector.
        only = not self.keys and len(inputs) == 1
        self._capture(store, next(iter(inputs.values())) if only else inputs)


class CallHook(_Hook):
    """Notes where gradients are on as the model, or a part that holds a tapped one, is called."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        store = self._open_store(module)
        if store is not None and torch.is_grad_enabled():
            store.grad_enabled = True


class ImageHook(_Hook):
    """Notes the first 4-D tensor that enters the model, or a part around the tapped module."""

    # Of its own: one that others write to would tie compiled code to the numbers in it.
    seen: list[tuple[int, int, int, int]]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store = self._open_store(module)
        if store is None:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4 and value.dtype in _PIXELS:
                captures = len(store.captured.get(self.alias, ()))
                _, channels, height, width = value.shape
                self.seen.append((captures, channels, height, width))
                return


def move_last(handles: Iterable[RemovableHandle]) -> None:
    """Puts a tap's hooks behind those of others, which may replace what a module hands on."""
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks is None or handle.id not in hooks:
            continue
        for key in reversed(hooks):
            if key == handle.id:
                break
            if not isinstance(hooks[key], _Hook):
                hooks.move_to_end(handle.id)
                break


def in_place(handles: Iterable[RemovableHandle]) -> bool:
    return all(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles)


def remove_all(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _select(value: Any, key: str, alias: str, path: str) -> Any:
    if isinstance(value, Mapping):
        for found in value:
            if str(found) == key:
                return value[found]
    elif isinstance(value, list | tuple) and re.fullmatch(r"-?\d+", key):
        if -len(value) <= int(key) < len(value):
            return value[int(key)]
    elif hasattr(value, key):
        return getattr(value, key)
    raise ValueError(
        f"`layers[{alias!r}]` must select what is there, got [{key}] for {_describe(value)} at "
        f"{path!r}."
    )


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} with the keys {list(value)}"
    return f"{kind} of {len(value)}" if isinstance(value, list | tuple) else kind
