"""Channel-wise distillation by hand."""

import math

from benchmarks.study.tests.methods.helpers import at_one_level, close, make


def test_channel_wise_distillation_is_the_teacher_s_divergence_from_the_student():
    # tau = 2: softmax(0, ln 3) = (1/4, 3/4); the teacher's is (1/2, 1/2).
    # KL = ln(2) / 2 + ln(2/3) / 2 = ln(4/3) / 2, times 4, in one of two channels of one of two
    # images.
    loss = make("cwd", {"a": 2}, {"a": 2})
    student = [[[[0, 2 * math.log(3)]], [[1, 5]]], [[[1, 2]], [[3, 4]]]]
    teacher = [[[[7, 7]], [[0, 4]]], [[[1, 2]], [[3, 4]]]]
    close(at_one_level(loss, student, teacher), math.log(4 / 3) / 2)
