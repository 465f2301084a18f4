"""The teacher of a distiller, which never moves."""

import pytest
import torch

from featkd import Distiller
from tests.helpers.distilled import make
from tests.helpers.models import LEVELS, Net, distillation_loss, images, snapshot, unchanged
from tests.helpers.tensors import close


class Watched(Net):
    """Notes on every call whether it trains and whether gradients are recorded."""

    def __init__(self, width):
        super().__init__(width)
        self.backbone.c2.register_forward_hook(
            lambda module, args, output: self.seen.append(
                (any(m.training for m in self.modules()), output.requires_grad)
            )
        )
        self.seen = []


def train_teacher(distiller):
    distiller.teacher.train()


def train_distiller(distiller):
    distiller.train()


def train_a_part(distiller):
    distiller.teacher.backbone.c1.norm.train()


@pytest.mark.parametrize("shared_input", [None, "backbone"])
@pytest.mark.parametrize("disturb", [train_distiller, train_teacher, train_a_part])
def test_the_teacher_evaluates_and_stays_bit_equal_whatever_is_set_to_train(disturb, shared_input):
    teacher = Watched(6)
    distiller = Distiller(Net(4), teacher, distillation_loss(), LEVELS, shared_input=shared_input)
    optimizer = torch.optim.AdamW(distiller.parameters(), 0.1)
    before, student = snapshot(teacher), snapshot(distiller.student)
    for seed in range(3):
        disturb(distiller)
        output, losses = distiller(images(seed=seed))
        (output.square().mean() + sum(losses.values())).backward()
        optimizer.step()
    assert teacher.seen == [(False, False)] * 3
    assert unchanged(teacher, before)
    assert not unchanged(distiller.student, student)


def test_train_and_eval_of_the_distiller_reach_the_student():
    distiller = make()
    assert distiller.train().student.backbone.c1.training
    assert not distiller.eval().student.backbone.c1.training


def test_the_teacher_is_no_part_of_the_distiller():
    distiller = make()
    teacher = distiller.teacher
    children = {"student": distiller.student, "loss": distiller.loss}
    assert dict(distiller.named_children()) == children
    held = {id(value) for value in [*teacher.parameters(), *teacher.buffers()]}
    assert not held & {id(value) for value in [*distiller.parameters(), *distiller.buffers()]}
    assert not set(teacher.modules()) & set(distiller.modules())
    prefixes = {name.split(".")[0] for name in distiller.state_dict()}
    assert prefixes == {"student", "loss"}
    distiller.float()
    assert next(teacher.parameters()).dtype == torch.float64


def test_a_printed_distiller_says_what_it_is_made_of():
    said = f"teacher=Net, layers={LEVELS}, shared_input=('backbone', 'backbone')"
    assert said in repr(make(shared_input="backbone"))


def test_the_state_dict_goes_into_another_distiller():
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    close(second(images())[0], first(images())[0], 0.0)
