"""The functions of featkd under one roof; their homes are the modules below.

**Accuracy.** What a function's `Accuracy` section states is its distance from the exact result for
the same inputs, computed in float32: for float32 and bfloat16 features of magnitude 1e-15 to 1e15,
all float16 ones, up to 100,000 positions and 2,048 channels, on the CPU; of a relation's products
the size is what counts. A gradient is then rounded once to the dtype of its input: to 0 below 3e-8
and to inf above 65,504 in float16. "The same sums of absolute values": the formula with every term,
the output's gradient included, made positive. Float64 inputs are computed in float64. `python -m
benchmarks.accuracy` measures it.

**Determinism.** On the CPU equal inputs give equal bits, values and gradients, from run to run with
one number of threads; another number may change the last digits (seen in the gradients of the
softmax relations). No function raises an error there under `torch.use_deterministic_algorithms`. On
CUDA, where neither has been run yet, torch before 2.6 refuses the concatenation relation's `cumsum`
under it.
"""

from .attention import attention_mask, channel_attention, spatial_attention
from .masked import attention_masked_loss
from .relation import (
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    gaussian_relation,
    non_local_loss,
)
from .transfer import attention_transfer_loss

__all__ = [
    "attention_mask",
    "attention_masked_loss",
    "attention_transfer_loss",
    "channel_attention",
    "concatenation_relation",
    "dot_product_relation",
    "embedded_gaussian_relation",
    "gaussian_relation",
    "non_local_loss",
    "spatial_attention",
]
