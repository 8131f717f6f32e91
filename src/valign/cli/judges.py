"""Who judges a chat model's answers: the options of every command that asks one, and the judge that they name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError, option
from valign.cli.common import resolve_chat
from valign.cli.early import refuse_judge

JUDGES = ("oracle", "phrases", "guard=FOLDER or ADDRESS", "FOLDER or ADDRESS of a chat model")


@dataclass(frozen=True, kw_only=True)
class AnswerJudgeOptions:
    """The judge of answers."""

    judge: str = option("", help=f"who judges answers: {', '.join(JUDGES)}; left out: oracle in the chat world, else phrases")
    judge_model: str = option("default", help="model that the judge's endpoint serves", needs={"judge": ()})
    judge_key_env: str | None = option(None, help="environment variable with the key of the judge's endpoint", needs={"judge": ()})

    def resolve(self, refusals: tuple[str, ...] = ()) -> Any:
        """The judge; None where none was named, for the prompts' own.

        Args: refusals: Further beginnings of refusals, for the judge ``phrases``.
        Raises: UserError for a name of none.
        """
        from valign.evaluation.chats.judges import GuardModelJudge, JudgeCard, ModelJudge, PhraseJudge

        name = self.judge
        if refusals and name not in ("", "phrases"):
            raise UserError(f"--refusal has no effect on the judge {name}. Leave it out, or take --judge phrases.")
        if name == "phrases" or (refusals and not name):
            return PhraseJudge(more=refusals)
        if name in ("", "oracle"):
            return None
        place = name.removeprefix("guard=")
        refuse_judge("--judge", name)
        chat = resolve_chat(place, model=self.judge_model, key_env=self.judge_key_env)
        card = JudgeCard(name=name, version=self.judge_model if place.startswith("http") else "")
        return GuardModelJudge(chat, card) if name.startswith("guard=") else ModelJudge(chat, card)


@dataclass(frozen=True, kw_only=True)
class MeasuredJudgeOptions(AnswerJudgeOptions):
    """The judge of answers, and what its error is measured on."""

    judge_labels: Path | None = option(
        None, help="table of prompt, answer, harmful and refused (0 or 1), on which the judge's error is measured"
    )
