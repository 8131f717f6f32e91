"""The policy: one file that data, experts, guard and evaluation follow."""

from valign.policy.block_rules import BlockRules
from valign.policy.category_names import CATEGORY_IDS, normalize_category
from valign.policy.loader import PolicyError, load_policy
from valign.policy.safety_config import ConfigStatement, GuardConfig, read_guard_config
from valign.policy.schema import (
    Action,
    BlockRule,
    Cases,
    Category,
    Combination,
    Concept,
    DataRequest,
    GuardRules,
    Guideline,
    IntentionWords,
    Norm,
    Policy,
    Principle,
    RewriterRole,
    Thresholds,
    ValueScene,
)

__all__ = [
    "CATEGORY_IDS",
    "Action",
    "BlockRule",
    "BlockRules",
    "Cases",
    "Category",
    "Combination",
    "Concept",
    "ConfigStatement",
    "DataRequest",
    "GuardConfig",
    "GuardRules",
    "Guideline",
    "IntentionWords",
    "Norm",
    "Policy",
    "PolicyError",
    "Principle",
    "RewriterRole",
    "Thresholds",
    "ValueScene",
    "load_policy",
    "normalize_category",
    "read_guard_config",
]
