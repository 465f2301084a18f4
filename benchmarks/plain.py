"""The paper's formulas as one would write them in torch without a second thought."""

import torch
from torch import Tensor


def masks(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    spatial = (student.abs().mean(1) + teacher.abs().mean(1)) / temperature
    channel = (student.abs().mean((2, 3)) + teacher.abs().mean((2, 3))) / temperature
    images, height, width = spatial.shape
    spatial_mask = spatial.flatten(1).softmax(1).view(images, height, width) * height * width
    return spatial_mask, channel.softmax(1) * channel.shape[1]


def masked_energy(student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    square = (teacher - student) ** 2 * spatial[:, None] * channel[:, :, None, None]
    return square.sum((1, 2, 3))


def masked_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        both = masks(student, teacher, temperature)
    return masked_energy(student, teacher, *both).sqrt().mean()


def transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    spatial = student.abs().mean(1) - teacher.abs().mean(1)
    channel = student.abs().mean((2, 3)) - teacher.abs().mean((2, 3))
    return spatial.flatten(1).norm(dim=1).mean() + channel.norm(dim=1).mean()


def relation(kind: str, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """With the matrix of all pairs, `(B, N, M)`."""
    theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
    if kind == "concatenation":
        pairs = (theta.mT + phi).relu() / phi.shape[2]
    elif kind == "dot_product":
        pairs = theta.mT @ phi / phi.shape[2]
    else:
        pairs = (theta.mT @ phi).softmax(2)
    return (pairs @ g.mT).mT
