"""Pearson's correlation by hand."""

import torch

from benchmarks.study.tests.methods.helpers import (
    TEACHER,
    at_one_level,
    close,
    features,
    make,
    value,
)


def test_pkd_is_one_minus_the_correlation_over_batch_and_positions():
    # (-1, 0, 1) and (-1, 1, 0) correlate at 1/2 whatever their scale, in the second channel at -1.
    loss = make("pkd", {"a": 2}, {"a": 2})
    student, teacher = [[1, 2, 3], [0, 1, 2]], [[10, 30, 20], [5, 4, 3]]
    along = [[[row] for row in side] for side in (student, teacher)]
    close(at_one_level(loss, [along[0]], [along[1]]), (0.5 + 2) / 2, 1e-7)
    across = [torch.tensor(side).T[..., None, None].tolist() for side in (student, teacher)]
    close(at_one_level(loss, *across), (0.5 + 2) / 2, 1e-7)


def test_pkd_is_finite_where_a_channel_is_constant():
    ours, theirs = features(TEACHER), features(TEACHER, seed=1)
    for side in (ours, theirs):
        side["a"][:, 0] = 3.0
    ours["a"].requires_grad_()
    value(make("pkd", TEACHER, TEACHER), ours, theirs).backward()
    assert ours["a"].grad.isfinite().all()
