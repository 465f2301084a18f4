"""Modules in pickle, deepcopy, state_dict and print."""

import copy
import io
import pickle

import pytest
import torch

from featkd import (
    AttentionMask,
    AttentionMaskedLoss,
    AttentionTransferLoss,
    ChannelAttention,
    FeatureDistillationLoss,
    NonLocalLoss,
    NonLocalRelation,
    SpatialAttention,
)
from tests.helpers.marks import each_module
from tests.helpers.module_cases import ALL_TERMS
from tests.helpers.tensors import close


@each_module
def test_pickle_deepcopy_and_state_dict(case):
    module, features = case.module(), case.features()
    expected = module(*features)
    close(pickle.loads(pickle.dumps(module))(*features), expected, 0.0)
    close(copy.deepcopy(module)(*features), expected, 0.0)
    fresh = case.module(seed=1)
    assert not torch.equal(fresh(*features), expected)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    close(fresh(*features), expected, 0.0)


PLAIN = {
    "SpatialAttention": (SpatialAttention(absolute=False), "absolute=False"),
    "ChannelAttention": (ChannelAttention(absolute=False), "absolute=False"),
    "AttentionMask": (AttentionMask(0.3, "probabilities"), "probabilities"),
    "NonLocalRelation": (NonLocalRelation(4, kind="concatenation", subsample=2), "concatenation"),
}


@pytest.mark.parametrize(("module", "option"), PLAIN.values(), ids=PLAIN)
def test_pickle_and_repr_of_the_maps(module, option):
    assert option in repr(module)
    features = [torch.rand(2, 4, 4, 6)] * (2 if isinstance(module, AttentionMask) else 1)
    close(pickle.loads(pickle.dumps(module))(*features), module(*features), 0.0)
    close(copy.deepcopy(module)(*features), module(*features), 0.0)
    assert (module.state_dict() == {}) == (not isinstance(module, NonLocalRelation))


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (AttentionTransferLoss(4, 3, reduction="sum"), ["4, 3", "sum"]),
        (AttentionMaskedLoss(4, 3, temperature=0.7, attention="channel"), ["0.7", "channel"]),
        (NonLocalLoss(4, 3, kind="gaussian"), ["gaussian", "teacher_relation='fixed'"]),
        (
            NonLocalLoss(4, 3, kind="gaussian", teacher_relation="trained"),
            ["teacher_relation='trained'"],
        ),
        (NonLocalRelation(4, kind="gaussian", residual=True, batch_norm=True), ["batch_norm=True"]),
        (FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS), ["alpha=0.5", "gamma=3.0"]),
    ],
)
def test_repr_names_the_arguments(module, options):
    for option in options:
        assert option in repr(module)


def test_a_loss_says_its_options_in_one_line():
    form = "reduction='mean', resize=None, normalize=False, standardize=False"
    transfer = AttentionTransferLoss(3, 2).extra_repr()
    assert transfer == f"3, 2, attention='both', absolute=True, {form}"
    non_local = NonLocalLoss(3, 2, kind="gaussian").extra_repr()
    assert non_local == f"3, 2, teacher_relation='fixed', {form}"
