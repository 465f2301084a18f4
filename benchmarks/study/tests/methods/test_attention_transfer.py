"""Attention transfer by hand."""

import math

from benchmarks.study.tests.methods.helpers import at_one_level, close, make


def test_an_attention_map_is_the_sum_of_squares_at_length_one():
    # (3, 4) / 5 from (1, 0): (-0.4, 0.8). The second image's maps are proportional.
    student = [[[[1, 2]], [[1, 0]], [[1, 0]]], [[[1, 1]], [[1, 0]], [[0, 1]]]]
    teacher = [[[[2, 0]]], [[[-3, 3]]]]
    loss = make("at", {"a": 3}, {"a": 1})
    close(at_one_level(loss, student, teacher), math.sqrt(0.8) / 2 / 2)
