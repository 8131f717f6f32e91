"""A retriever of value principles by the findings of guard stages: word lists, or a trained head."""

from dataclasses import dataclass

from valign.checks import UserError
from valign.files import hash_value
from valign.guard.stages import Stage
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
        found = next((verdict for stage in self.stages if (verdict := stage.check(prompt)).fired), None)
        if found is None:
            return None
        return next((one.id for one in self.policy.principles if one.category and one.category == found.category), None)

    def fingerprint(self) -> str:
        """Of the policy and the stages' names; a stage's own weights are not seen."""
        return hash_value(["stages", self.policy.fingerprint(), [stage.name for stage in self.stages]])
