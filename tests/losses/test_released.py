"""The worked example of the authors' released code, every term and the total, to 1e-12."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import nn

import featkd
from featkd import functional
from tests.helpers import reference
from tests.helpers.tensors import close, tensor

EXAMPLE = json.loads((Path(__file__).with_name("released_values.json")).read_text())


def tensors(node):
    """The example with every list as a float64 tensor."""
    if isinstance(node, dict):
        return {name: tensors(value) for name, value in node.items()}
    return tensor(node) if isinstance(node, list) else node


RELEASED = tensors(EXAMPLE)
STUDENT, TEACHER, TERMS = RELEASED["student"], RELEASED["teacher"], RELEASED["terms"]
ADAPTERS = RELEASED["adapters"]
TOLERANCE = 1e-12
NORM = {"reduction": "norm"}


def agree(actual, expected):
    close(actual, expected, TOLERANCE / 10)  # 1e-12 even for the terms near 10


@pytest.fixture
def masks():
    return {
        "spatial_mask": functional.attention_mask(
            functional.spatial_attention(STUDENT),
            functional.spatial_attention(TEACHER),
            temperature=0.5,
            fusion="probabilities",
        ),
        "channel_mask": functional.attention_mask(
            functional.channel_attention(STUDENT),
            functional.channel_attention(TEACHER),
            temperature=0.5,
            fusion="probabilities",
        ),
    }


def relation(features, layers):
    """W(r) + x, the released non-local block."""
    theta, phi, g = (F.conv2d(features, **layers[name]) for name in ("theta", "phi", "g"))
    return F.conv2d(functional.dot_product_relation(theta, phi, g), **layers["conv_out"]) + features


def masked_loss(**masks):
    return functional.attention_masked_loss(
        F.conv2d(STUDENT, **ADAPTERS["feature"]), TEACHER, **masks, **NORM
    )


def transfer_loss():
    return functional.attention_transfer_loss(
        STUDENT,
        TEACHER,
        spatial_adapter=lambda attention: F.conv2d(attention, **ADAPTERS["spatial"], padding=1),
        channel_adapter=lambda attention: F.linear(attention, **ADAPTERS["channel"]),
        absolute=False,
        **NORM,
    )


def relation_loss():
    ours = F.conv2d(relation(STUDENT, RELEASED["student_relation"]), **ADAPTERS["relation"])
    theirs = relation(TEACHER, RELEASED["teacher_relation"])
    return functional.non_local_loss(ours, theirs, **NORM)


def load(module, **layers):
    """Give the named submodules the weights of the example."""
    for path, weights in layers.items():
        layer = module.get_submodule(path.replace("__", "."))
        layer.double().load_state_dict(weights)
    return module.double()


def load_relations(module, prefix=""):
    sides = ("student_relation", "teacher_relation")
    layers = {f"{side}__{name}": RELEASED[side][name] for side in sides for name in RELEASED[side]}
    return load(module, adapter=ADAPTERS["relation"], **layers)


def load_transfer(module):
    adapters = {f"{name}_adapter": ADAPTERS[name] for name in ("spatial", "channel")}
    return load(module, **{name: adapters[name] for name in adapters if getattr(module, name)})


# --- through the functions ------------------------------------------------------------------------


def test_masks(masks):
    for name, mask in masks.items():
        agree(mask, RELEASED[name])


def test_masked_terms(masks):
    agree(masked_loss(**masks), TERMS["masked_spatial_and_channel"])
    agree(masked_loss(spatial_mask=masks["spatial_mask"]), TERMS["masked_spatial_only"])


def test_transfer_terms():
    agree(transfer_loss(), TERMS["spatial_transfer"] + TERMS["channel_transfer"])


def test_each_transfer_term_by_itself():
    """With the other side's attention already equal, one of the two distances is left."""
    spatial = F.conv2d(
        functional.spatial_attention(STUDENT, absolute=False)[:, None],
        **ADAPTERS["spatial"],
        padding=1,
    )
    channel = F.linear(functional.channel_attention(STUDENT, absolute=False), **ADAPTERS["channel"])
    for name, adapted, equal in [
        ("spatial", spatial, {"channel_adapter": lambda _: target("channel")}),
        ("channel", channel, {"spatial_adapter": lambda _: target("spatial")[:, None]}),
    ]:
        adapters = equal | {f"{name}_adapter": lambda _, adapted=adapted: adapted}
        loss = functional.attention_transfer_loss(
            STUDENT, TEACHER, **adapters, absolute=False, **NORM
        )
        agree(loss, TERMS[f"{name}_transfer"])


def target(name):
    return getattr(functional, f"{name}_attention")(TEACHER, absolute=False)


def test_non_local_term():
    agree(relation_loss(), TERMS["non_local"])


def test_total(masks):
    """The two-stage code: 4e-3 on L_AT, 7e-5 on L_AM (spatial mask only) and on L_NLD."""
    total = (
        4e-3 * transfer_loss()
        + 7e-5 * masked_loss(spatial_mask=masks["spatial_mask"])
        + 7e-5 * relation_loss()
    )
    agree(total, RELEASED["total_two_stage_weights"])


# --- through the modules --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "term"),
    [("spatial", "masked_spatial_only"), ("both", "masked_spatial_and_channel")],
)
def test_masked_module(attention, term):
    loss = featkd.AttentionMaskedLoss(
        4, 4, temperature=0.5, fusion="probabilities", attention=attention, **NORM
    )
    agree(load(loss, adapter=ADAPTERS["feature"])(STUDENT, TEACHER), TERMS[term])


@pytest.mark.parametrize("attention", ["spatial", "channel"])
def test_transfer_module(attention):
    loss = featkd.AttentionTransferLoss(4, 4, attention=attention, absolute=False, **NORM)
    agree(load_transfer(loss)(STUDENT, TEACHER), TERMS[f"{attention}_transfer"])


def test_relation_module():
    block = featkd.NonLocalRelation(4, kind="dot_product", residual=True)
    for side, features in (("student_relation", STUDENT), ("teacher_relation", TEACHER)):
        agree(load(block, **RELEASED[side])(features), relation(features, RELEASED[side]))


@pytest.mark.parametrize("teacher_relation", ["fixed", "trained"])
def test_non_local_module(teacher_relation):
    loss = featkd.NonLocalLoss(
        4, 4, kind="dot_product", residual=True, teacher_relation=teacher_relation, **NORM
    )
    agree(load_relations(loss)(STUDENT, TEACHER), TERMS["non_local"])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_preset_gives_every_term_and_the_total(batch_norm):
    """The example was made without batch normalisation; with one that changes nothing, the same."""
    preset = dataclasses.replace(featkd.RELEASED_TWO_STAGE, batch_norm=batch_norm)
    loss = featkd.FeatureDistillationLoss(4, 4, hyperparameters=preset).eval()
    for layer in (x for x in loss.modules() if isinstance(x, nn.BatchNorm2d)):
        layer.double().weight.detach().copy_((layer.running_var + layer.eps).sqrt())
    load_transfer(loss.attention_transfer["features"])
    load(loss.attention_masked["features"], adapter=ADAPTERS["feature"])
    load_relations(loss.non_local["features"])
    losses = loss(STUDENT, TEACHER)
    transferred = TERMS["spatial_transfer"] + TERMS["channel_transfer"]
    agree(losses["loss_attention_transfer"], 4e-3 * transferred)
    agree(losses["loss_attention_masked"], 7e-5 * TERMS["masked_spatial_only"])
    agree(losses["loss_non_local"], 7e-5 * TERMS["non_local"])
    agree(sum(losses.values()), RELEASED["total_two_stage_weights"])


# --- through the loops: the reference itself reads the released code right ------------------------


def test_the_loops_reproduce_the_terms():
    student, teacher = STUDENT.numpy(), TEACHER.numpy()

    def arrays(weights):
        return {name: value.numpy() for name, value in weights.items()}

    def block(features, layers):
        theta, phi, g = (
            reference.convolution(features, **arrays(layers[name]))
            for name in ("theta", "phi", "g")
        )
        r = reference.dot_product_relation(theta, phi, g)
        return reference.convolution(r, **arrays(layers["conv_out"])) + features

    ours = reference.convolution(
        block(student, RELEASED["student_relation"]), **arrays(ADAPTERS["relation"])
    )
    theirs = block(teacher, RELEASED["teacher_relation"])
    agree(tensor(reference.non_local_loss(ours, theirs, **NORM)), TERMS["non_local"])
    adapted = reference.convolution(student, **arrays(ADAPTERS["feature"]))
    loss = reference.attention_masked_loss(
        adapted, teacher, spatial_mask=RELEASED["spatial_mask"].numpy(), **NORM
    )
    agree(tensor(loss), TERMS["masked_spatial_only"])
