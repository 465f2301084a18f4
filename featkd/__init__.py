"""Feature-distillation losses for object detectors: Zhang & Ma, ICLR 2021, in pure PyTorch."""

from .attention import AttentionMask, ChannelAttention, SpatialAttention
from .distillation import FeatureDistillationLoss
from .distiller import Distiller
from .functional import (
    attention_mask,
    attention_masked_loss,
    attention_transfer_loss,
    channel_attention,
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    gaussian_relation,
    non_local_loss,
    spatial_attention,
)
from .hyperparameters import (
    FPN_OUTPUTS,
    NORMALIZED,
    ONE_STAGE,
    RELEASED_ONE_STAGE,
    RELEASED_TWO_STAGE,
    TWO_STAGE,
    Hyperparameters,
)
from .layouts import PatchTokens, from_channels_last, from_tokens
from .masked import AttentionMaskedLoss
from .matching import Layer, LayerMatch, match_layers
from .non_local import NonLocalLoss, NonLocalRelation
from .report import Report
from .taps import FeatureTap
from .transfer import AttentionTransferLoss

__version__ = "0.1.0"

__all__ = [
    "FPN_OUTPUTS",
    "NORMALIZED",
    "ONE_STAGE",
    "RELEASED_ONE_STAGE",
    "RELEASED_TWO_STAGE",
    "TWO_STAGE",
    "AttentionMask",
    "AttentionMaskedLoss",
    "AttentionTransferLoss",
    "ChannelAttention",
    "Distiller",
    "FeatureDistillationLoss",
    "FeatureTap",
    "Hyperparameters",
    "Layer",
    "LayerMatch",
    "NonLocalLoss",
    "NonLocalRelation",
    "PatchTokens",
    "Report",
    "SpatialAttention",
    "attention_mask",
    "attention_masked_loss",
    "attention_transfer_loss",
    "channel_attention",
    "concatenation_relation",
    "dot_product_relation",
    "embedded_gaussian_relation",
    "from_channels_last",
    "from_tokens",
    "gaussian_relation",
    "match_layers",
    "non_local_loss",
    "spatial_attention",
]
