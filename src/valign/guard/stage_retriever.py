"""Retrievers of value principles by the findings of guard stages: word lists, a trained head, a probe on the model's encoders."""

from dataclasses import dataclass

from valign.checks import UserError
from valign.files import hash_value
from valign.guard.head.probe import ProbeStage
from valign.guard.stages import Stage, stage_fingerprint
from valign.guard.value_retriever import FirstOf, KeywordRetriever
from valign.interfaces import Retriever
from valign.models.heads.text_probe import TextProbe
from valign.policy import Policy


@dataclass(frozen=True)
class StageRetriever:
    """The first principle of the category that the first finding of the stages names; None where they find nothing.

    Raises: UserError if no principle of the policy has a category.
    """

    policy: Policy
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not any(principle.category for principle in self.policy.principles):
            raise UserError(f"policy {self.policy.id} has no principle with a category. Give one, or choose another retriever.")

    def retrieve(self, prompt: str) -> str | None:
        if not prompt.strip():
            return None
        found = next((verdict for stage in self.stages if (verdict := stage.check(prompt)).fired), None)
        if found is None:
            return None
        return next((one.id for one in self.policy.principles if one.category and one.category == found.category), None)

    def fingerprint(self) -> str:
        """Of the policy, the stages' names, and the weights of those that say theirs."""
        return hash_value(["stages", self.policy.fingerprint(), [[stage.name, stage_fingerprint(stage)] for stage in self.stages]])


def probe_retriever(policy: Policy, probe: TextProbe) -> Retriever:
    """The principle of the category that the probe finds, as the model reads the prompt; keywords for the principles without one.

    The probe is asked first, so that a prompt for harm is not taken for one that only names a role: a bias principle's token is on
    in half of the images.

    Raises: UserError if no principle has a category that the probe knows.
    """
    covered = [one.category for one in policy.principles if one.category in probe.categories]
    if not covered:
        raise UserError(
            f"policy {policy.id} must have a principle of a category that the probe knows, got none of "
            f"{', '.join(probe.categories)}. Give its principles a category, or choose another retriever."
        )
    read = StageRetriever(policy, (ProbeStage(probe, categories=covered),))
    others = tuple(one.id for one in policy.principles if one.category not in covered and policy.principle_keywords(one))
    return FirstOf((read, KeywordRetriever(policy, among=others))) if others else read
