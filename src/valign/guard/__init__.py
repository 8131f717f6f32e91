"""The guard in front of an image model: find what is unsafe, understand what was meant, rewrite, draw, look, or refuse."""

from valign.guard.guard import STAGES, Guard, Stage
from valign.guard.learned import LearnedStage
from valign.guard.lexical import LexicalStage
from valign.guard.pipeline import GuardedOutput, GuardedPipeline
from valign.guard.principles import StageRetriever
from valign.guard.records import Attempt, Drawing, GuardDecision, GuardedImage, GuardResult, Verdict
from valign.guard.semantic import SemanticStage
from valign.guard.value_token import ValueToken
from valign.guard.values import ValuesStage

__all__ = [
    "STAGES",
    "Attempt",
    "Drawing",
    "Guard",
    "GuardDecision",
    "GuardResult",
    "GuardedImage",
    "GuardedOutput",
    "GuardedPipeline",
    "LearnedStage",
    "LexicalStage",
    "SemanticStage",
    "Stage",
    "StageRetriever",
    "ValueToken",
    "ValuesStage",
    "Verdict",
]
