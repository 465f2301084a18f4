"""The methods that the paper compares with or builds on, each a loss for `featkd.Distiller`."""

from benchmarks.study.methods.attention_transfer import AttentionTransfer
from benchmarks.study.methods.baseline import Baseline
from benchmarks.study.methods.cwd import ChannelWiseDistillation
from benchmarks.study.methods.fine_grained_imitation import FineGrainedImitation
from benchmarks.study.methods.fitnets import FitNets
from benchmarks.study.methods.overhaul import FeatureOverhaul
from benchmarks.study.methods.pkd import PearsonDistillation

METHODS: dict[str, type[Baseline]] = {
    method.name: method
    for method in (
        FitNets,
        AttentionTransfer,
        FineGrainedImitation,
        FeatureOverhaul,
        ChannelWiseDistillation,
        PearsonDistillation,
    )
}
