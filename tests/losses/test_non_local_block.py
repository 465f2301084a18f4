"""NonLocalRelation: a relation with its embeddings, and the released block around it."""

import pytest
import torch
from torch import nn

import featkd
from featkd import NonLocalLoss, NonLocalRelation
from tests.helpers.marks import each_kind, torch_scripts
from tests.helpers.module_cases import randomize, relation_by_functions
from tests.helpers.tensors import close, gradients, normal, tensor, trained


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        # theta, phi and g are x, 2 x and 3 x: r_i = x_i (2 * 3 + 4 * 6) / 2 = 15 x_i.
        (False, [15, 30]),
        # W is 4, and x is added: 4 * 15 + 1 = 61, 4 * 30 + 2 = 122.
        (True, [61, 122]),
    ],
)
def test_golden_block(residual, expected):
    block = NonLocalRelation(1, kind="dot_product", residual=residual).double()
    layers = [block.theta, block.phi, block.g, *[block.conv_out] * residual]
    for factor, layer in enumerate(layers, start=1):
        nn.init.constant_(layer.weight, factor)
        nn.init.zeros_(layer.bias)
    close(block(tensor([[[[1, 2]]]])), tensor([[[expected]]]))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("subsample", [1, 2])
@each_kind
def test_the_relation_module_equals_its_function(kind, subsample, residual):
    block = NonLocalRelation(4, kind=kind, subsample=subsample, residual=residual).double()
    features = normal(2, 4, 4, 6)
    relation = block(features)
    assert relation.shape == (2, 4 if residual else 2, 4, 6)
    close(relation, relation_by_functions(block, features))


@pytest.mark.parametrize("inter_channels", [None, 1, 7])
@each_kind
def test_channels_of_a_relation(kind, inter_channels):
    for channels, default in ((1, 1), (4, 2), (7, 3)):
        block = NonLocalRelation(channels, kind=kind, inter_channels=inter_channels)
        assert block(torch.zeros(1, channels, 2, 3)).shape == (1, inter_channels or default, 2, 3)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_relation_of_few_channels_embeds_them_in_one(channels):
    assert NonLocalRelation(channels, kind="embedded_gaussian").inter_channels == 1


@each_kind
def test_keys_may_be_pooled_by_more_than_the_map_has(kind):
    """The smallest level of a pyramid may be smaller than the released code's factor."""
    for size in ((1, 1), (1, 3), (3, 5)):
        block = NonLocalRelation(4, kind=kind, subsample=8)
        assert block(normal(2, 4, *size, dtype=torch.float32)).shape == (2, 2, *size)


@each_kind
def test_a_constant_map_has_the_same_relation_with_fewer_keys(kind):
    full, few = (NonLocalRelation(4, kind=kind, subsample=s).double() for s in (1, 2))
    few.load_state_dict(full.state_dict())
    features = normal(2, 4, 1, 1).expand(-1, -1, 4, 6)
    close(few(features), full(features))


@each_kind
def test_a_relation_takes_features_that_were_made_under_inference_mode(kind):
    block, features = NonLocalRelation(4, kind=kind, residual=True).double(), normal(2, 4, 3, 5)
    with torch.inference_mode():
        frozen = features.clone()
    close(block(frozen), block(features), 0.0)
    found, expected = (gradients(block(x), trained(block)) for x in (frozen, features))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 0.0)


# --- the released block: W with a batch normalisation ---------------------------------------------


def normalised_block(channels=4, **options):
    return NonLocalRelation(
        channels, kind="dot_product", residual=True, batch_norm=True, **options
    ).double()


def test_a_batch_normalisation_starts_as_the_identity_of_its_block():
    features = normal(2, 4, 3, 5)
    for training in (True, False):
        close(normalised_block().train(training)(features), features, 0.0)
    loss = NonLocalLoss(
        4, 4, kind="dot_product", residual=True, batch_norm=True, teacher_relation="trained"
    )
    other = normal(2, 4, 3, 5, seed=1)
    close(loss.double()(features, other), featkd.non_local_loss(features, other))


def test_an_empty_batch_leaves_the_kept_statistics():
    block = normalised_block()
    assert block(torch.zeros(0, 4, 3, 5).double()).shape == (0, 4, 3, 5)
    assert not block.norm_out.running_mean.any()
    assert (block.norm_out.running_var == 1).all()


@torch_scripts
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_released_block(training):
    block = normalised_block().train(training)
    randomize(block)
    features = normal(2, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(block, (features,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(block, (features,))


def test_a_released_block_that_is_asked_twice_has_both_gradients():
    block = normalised_block()
    randomize(block)
    first, second = (normal(2, 4, 3, 5, seed=seed) for seed in (1, 2))
    together = gradients(block(first).sum() + block(second).square().sum(), trained(block))
    apart = [gradients(x, trained(block)) for x in (block(first), block(second).square())]
    for both, a, b in zip(together, *apart, strict=True):
        close(both, a + b)


def test_a_sync_batch_norm_conversion_keeps_the_start():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(normalised_block())
    assert isinstance(block.norm_out, nn.SyncBatchNorm)
    assert not block.norm_out.weight.any()
