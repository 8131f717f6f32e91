"""The guard around an image model: find what is unsafe, understand what was meant, rewrite, generate, check, or refuse."""

from valign.guard.guard import Guard
from valign.guard.head.learned import LearnedStage
from valign.guard.head.probe import ProbeStage
from valign.guard.images.pipeline import GuardedOutput, GuardedPipeline
from valign.guard.images.value_token import ValueToken
from valign.guard.records import Attempt, GenerationAttempt, GuardDecision, GuardedImage, GuardResult, Verdict
from valign.guard.request import PromptRequest, RequestGuard, RequestResult
from valign.guard.rules.lexical import LexicalStage
from valign.guard.rules.norms import ValuesStage
from valign.guard.rules.semantic import SemanticStage
from valign.guard.stage_retriever import StageRetriever, probe_retriever
from valign.guard.stages import STAGES, Stage, StageParts

__all__ = [
    "STAGES",
    "Attempt",
    "GenerationAttempt",
    "Guard",
    "GuardDecision",
    "GuardResult",
    "GuardedImage",
    "GuardedOutput",
    "GuardedPipeline",
    "LearnedStage",
    "LexicalStage",
    "ProbeStage",
    "PromptRequest",
    "RequestGuard",
    "RequestResult",
    "SemanticStage",
    "Stage",
    "StageParts",
    "StageRetriever",
    "ValueToken",
    "ValuesStage",
    "Verdict",
    "probe_retriever",
]
