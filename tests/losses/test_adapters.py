"""The adapters, and the batch normalisation of the released block."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featkd import AttentionMaskedLoss, AttentionTransferLoss, NonLocalLoss
from featkd.losses._adapters import BatchNorm2d, Conv2d, Linear, as_product
from tests.helpers.module_cases import randomize
from tests.helpers.tensors import close, gradients, normal


def test_adapters_are_those_of_appendix_b():
    transfer = AttentionTransferLoss(4, 3)
    assert transfer.spatial_adapter.weight.shape == (1, 1, 3, 3)
    assert transfer.channel_adapter.weight.shape == (3, 4)
    assert AttentionMaskedLoss(4, 3, temperature=1.0).adapter.weight.shape == (3, 4, 1, 1)
    assert NonLocalLoss(8, 6, kind="gaussian").adapter.weight.shape == (3, 4, 1, 1)
    residual = NonLocalLoss(8, 6, kind="gaussian", residual=True)
    assert residual.adapter.weight.shape == (6, 8, 1, 1)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_a_convolution_of_odd_size_keeps_the_map_s_and_starts_as_the_identity(kernel_size):
    features = normal(2, 3, 6, 7)
    close(Conv2d(3, 3, kernel_size)(features), features, 0.0)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("bias", [None, normal(4, seed=2)])
def test_the_product_in_place_of_a_convolution_is_the_convolution(kernel_size, images, bias):
    features = normal(images, 3, 6, 7).to(memory_format=torch.channels_last)
    weight = normal(4, 3, kernel_size, kernel_size, seed=1)
    expected = F.conv2d(features, weight, bias, padding=kernel_size // 2)
    close(as_product(features, weight, bias), expected, 1e-12)


def test_no_convolution_is_compiled_on_a_cpu_nor_without_a_bias():
    operations = []

    def backend(graph, inputs):
        operations.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    layer = Conv2d(3, 4, 1)
    layer.bias = None
    features = torch.randn(2, 3, 6, 7)
    close(torch.compile(layer, fullgraph=True, backend=backend)(features), layer(features), 1e-5)
    assert torch.baddbmm in operations
    assert F.conv2d not in operations


def test_an_adapter_between_widths_starts_as_torch_s_own():
    for ours, torchs, sizes in ((Conv2d, nn.Conv2d, (3, 5, 1)), (Linear, nn.Linear, (3, 5))):
        weights = []
        for layer in (ours, torchs):
            torch.manual_seed(0)
            weights.append(layer(*sizes).weight)
        close(*weights, 0.0)


def test_features_wider_than_the_parameters_are_not_rounded():
    features = normal(2, 3, 6, 7)
    close(Conv2d(3, 3, 1).half()(features), features, 0.0)
    close(Linear(3, 3).half()(features[:, :, 0, 0]), features[:, :, 0, 0], 0.0)


def test_a_batch_normalisation_is_torch_s_own_but_for_its_start():
    layer, plain = (each(4, eps=0.1).double() for each in (BatchNorm2d, nn.BatchNorm2d))
    assert not layer.weight.any()
    assert not layer.bias.any()
    randomize(layer)
    layer.num_batches_tracked.zero_()
    plain.load_state_dict(layer.state_dict())
    for training in (True, True, False):
        features = [normal(2, 4, 3, 5, seed=7).requires_grad_() for _ in range(2)]
        ours, torchs = (
            each.train(training)(x) for each, x in zip((layer, plain), features, strict=True)
        )
        close(ours, torchs, 0.0)
        for a, b in zip(
            gradients(ours.square(), [features[0], *layer.parameters()]),
            gradients(torchs.square(), [features[1], *plain.parameters()]),
            strict=True,
        ):
            close(a, b, 0.0)
        for name, value in plain.state_dict().items():
            close(layer.state_dict()[name], value, 0.0)
    layer.reset_parameters()
    assert not layer.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_normalisation_of_narrow_features_is_as_wide_as_its_parameters(dtype):
    layer, features = BatchNorm2d(4).to(dtype), normal(2, 4, 3, 5).bfloat16()
    randomize(layer)
    for training in (True, False):
        value = layer.train(training)(features)
        assert value.dtype == dtype
        close(value, copy.deepcopy(layer)(features.to(dtype)), 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_narrow_batch_normalisation_keeps_its_statistics_of_wide_features(dtype):
    layer, plain = BatchNorm2d(4), nn.BatchNorm2d(4).double()
    randomize(layer)
    layer = layer.to(dtype)
    plain.load_state_dict(layer.state_dict())
    features = normal(2, 4, 3, 5)
    for _ in range(2):
        close(layer(features), plain(features))
    assert layer.running_var.dtype == dtype
    assert layer.num_batches_tracked == plain.num_batches_tracked
    for name in ("running_mean", "running_var"):
        close(getattr(layer, name), getattr(plain, name), 2 * torch.finfo(dtype).eps)


def test_a_single_value_a_channel_is_its_own_mean():
    """torch refuses it; its variance is no estimate, so that the kept statistics stay."""
    layer = BatchNorm2d(4).double()
    randomize(layer)
    before = copy.deepcopy(layer.state_dict())
    features = normal(1, 4, 1, 1).requires_grad_()
    value = layer(features)
    close(value, layer.bias[None, :, None, None], 0.0)
    close(gradients(value, [features])[0], torch.zeros_like(features), 0.0)
    assert (BatchNorm2d(4).double()(features) == 0).all()
    assert layer(features * math.nan).isnan().all()
    for name, kept in layer.state_dict().items():
        close(kept, before[name], 0.0)
    assert layer.eval()(features).ne(value).all()
