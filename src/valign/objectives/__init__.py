"""Losses and penalties: pure maths on tensors, one file per method; one value per pair of images, or per token of an answer."""

from collections.abc import Mapping
from typing import Any

from valign.objectives.erasing.esd import ErasedTarget
from valign.objectives.min_snr import min_snr_weight
from valign.objectives.preference.diffusion_dpo import DiffusionDPO
from valign.objectives.preference.livo import LiVO
from valign.objectives.preference.pair_errors import PairErrors, PairObjective, denoising_error
from valign.objectives.preference.winner_safeguard import loser_scale
from valign.objectives.preserving.agl import AGL
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective, token_kl, token_mean
from valign.objectives.preserving.constrained_sft import ConstrainedSFT
from valign.objectives.preserving.inverted_hinge import InvertedHinge
from valign.objectives.preserving.kl_to_start import KlToStart
from valign.objectives.preserving.safe_align import SafeAlign
from valign.objectives.preserving.safety_recovery import SafetyRecovery
from valign.objectives.preserving.star_dss import StarDSS, StaticShaping
from valign.objectives.preserving.unlearning_baselines import GradientAscent, NegativePreference
from valign.plugins import with_plugins

# A row is a frozen dataclass whose instances are `PairObjective`s.
OBJECTIVES: Mapping[str, type[Any]] = with_plugins("valign.objectives", {"diffusion-dpo": DiffusionDPO, "livo": LiVO})

# What keeps a model's safety, or removes what it knows, in `valign finetune --preserve`. A row is a frozen dataclass: a
# `TokenObjective`, or one of the two that act elsewhere: AGL on weights, SafetyRecovery on rows.
PRESERVING: Mapping[str, type[Any]] = with_plugins(
    "valign.preserving",
    {
        "agl": AGL,
        "kl": KlToStart,
        "constrained-sft": ConstrainedSFT,
        "star-dss": StarDSS,
        "static-shaping": StaticShaping,
        "safety-recovery": SafetyRecovery,
        "safe-align": SafeAlign,
        "ihl": InvertedHinge,
        "npo": NegativePreference,
        "ascent": GradientAscent,
    },
)

__all__ = [
    "AGL",
    "OBJECTIVES",
    "PRESERVING",
    "AnswerTokens",
    "ConstrainedSFT",
    "DiffusionDPO",
    "ErasedTarget",
    "GradientAscent",
    "InvertedHinge",
    "KlToStart",
    "LiVO",
    "NegativePreference",
    "PairErrors",
    "PairObjective",
    "SafeAlign",
    "SafetyRecovery",
    "StarDSS",
    "StaticShaping",
    "TokenObjective",
    "denoising_error",
    "loser_scale",
    "min_snr_weight",
    "token_kl",
    "token_mean",
]
