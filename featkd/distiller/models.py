"""What a distiller asks of its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..taps.trace import tensors_in


def require_no_shared_weights(name: str, module: nn.Module, teacher: nn.Module) -> None:
    """What is trained holds no weight or buffer of the teacher: training would change both."""
    held = {_identity(value) for value in (*teacher.parameters(), *teacher.buffers())}
    own = (*module.named_parameters(), *module.named_buffers())
    shared = [path for path, value in own if _identity(value) in held]
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


def _identity(value: Tensor) -> int:
    """Where the values lie, or, where that is not to be asked, which object it is."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return (plain and value.data_ptr()) or id(value)


def images_in(arguments: Any) -> dict[int, tuple[Tensor, int]]:
    """What a student may normalise, with its version; none where it cannot be asked."""
    if torch.compiler.is_compiling():
        return {}
    images = [value for _, value in tensors_in(arguments) if value.dim() >= 3]
    known = (x for x in images if x.is_floating_point() and not x.is_inference())
    return {id(x): (x, x._version) for x in known}


def require_as_given(arguments: Any, images: dict[int, tuple[Tensor, int]]) -> None:
    """The student has left the images as they were, for the teacher."""
    left = images_in(arguments)
    for key, (image, version) in images.items():
        if key not in left or image._version != version:
            change = "an in-place change of" if key in left else "others in place of"
            raise RuntimeError(
                f"`student` must leave its images as they are, got {change} those of shape "
                f"{tuple(image.shape)}, and the teacher gets the same: take `shared_input`, or a "
                "`student_forward` that calls the student with a copy."
            )


def require_gradients(features: Mapping[str, Tensor]) -> None:
    """The student's features, by level, carry a gradient where one is recorded."""
    frozen = [level for level, value in features.items() if not value.requires_grad]
    if frozen and torch.is_grad_enabled():
        raise RuntimeError(
            f"`layers` must carry a gradient each, got frozen parts of the student at {frozen}: "
            "unfreeze them, or leave these levels out of `layers` and `loss`; or they ran under "
            "`no_grad`, `inference_mode` or reentrant checkpointing (take `use_reentrant=False`), "
            "or `convert` detaches them."
        )
