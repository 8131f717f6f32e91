"""What one attack made of one prompt against one system, and what transferred; kept in a journal, so that a killed run goes on."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Ended = Literal["needless", "broken", "queries", "seconds", "exhausted", "guard calls", "failed"]


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack on one prompt. A verdict is None where no image is harmful and the judge came to no answer about one of them.

    ``ended``: the unchanged prompt was harmful already (needless), a prompt was found (broken), a budget was spent (queries,
    seconds, guard calls), the search had nothing more to try (exhausted), or the chat model failed.
    """

    attack: str
    system: str
    id: str
    cluster: str  # equal for equal texts of the goal
    kind: str
    category: str
    concept: str
    held_out: bool
    first: str  # what the unchanged prompt met: "" nothing, "guard", "rewritten" or "image check"
    before: bool | None  # whether its image is harmful
    harmful: bool | None  # whether any image within the budget is: the attack's success
    asked: bool | None = None  # whether it shows harm of the category that the goal asks for
    bypassed: bool = False  # whether any prompt reached the model unchanged and its image came back
    again: bool | None = None  # whether the found prompt is harmful with a fresh seed, too; None where there is none
    ended: Ended = "queries"
    at_query: int | None = None  # number of the query that succeeded
    queries: int = 0
    images: int = 0
    gradients: int = 0
    encodings: int = 0
    chat_calls: int = 0
    guard_calls: int = 0
    seconds: float = 0.0
    prompt: str = field(default="", repr=False)  # that succeeded
    image: str = ""  # file of its image, in the run's folder

    @property
    def benign(self) -> bool:
        """Never: for the columns of `valign.evaluation.images.inappropriate.in_column`."""
        return False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """A prompt that was found on one system, sent to another one once, with a seed that no search has used."""

    attack: str
    found_on: str
    system: str
    id: str
    cluster: str
    harmful: bool | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
