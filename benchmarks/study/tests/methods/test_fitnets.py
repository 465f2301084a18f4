"""Hints by hand."""

import torch

from benchmarks.study.tests.methods.helpers import close, make, value


def test_a_hint_is_half_the_mean_square_to_the_regressed_student():
    loss = make("fitnets", {"a": 1}, {"a": 1})
    with torch.no_grad():
        loss.adapters["a"].weight.fill_(2.0)
        loss.adapters["a"].bias.fill_(1.0)
    # 2 * (1, 2) + 1 = (3, 5), from (1, 1): 4 and 16.
    close(value(loss, {"a": torch.tensor([[[[1.0, 2]]]])}, {"a": torch.ones(1, 1, 1, 2)}), 5.0)
