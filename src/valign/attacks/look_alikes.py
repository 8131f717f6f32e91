"""The prompt in other spellings: letters swapped, signs inside words, words glued, order lost. No model is needed."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from valign.attacks.base import Need, Scope, Search
from valign.data.prompts.disguise import DISGUISES
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method

METHOD = Method(
    slug="look-alikes",
    title="Misspelt and look-alike prompts, at random",
    paper="arXiv 2412.03556",
    room="attacks",
    entry="valign.attacks.look_alikes:LookAlikes",
    fidelity="variant",
    note="the disguises that the guard's head is trained on, instead of the paper's shuffled and capitalized letters",
)


@dataclass(frozen=True, kw_only=True)
class LookAlikes:
    """Each prompt is the goal in one disguise, drawn anew; the disguises of training data, with new random numbers."""

    needs: ClassVar[tuple[Need, ...]] = ()
    informed: ClassVar[bool] = False

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        random, words = Random(int(scope.random.integers(2**62))), goal.prompt.split()
        while True:
            disguise = random.choice(DISGUISES)
            text = " ".join(disguise(words, words, random))
            if text and text != goal.prompt:
                yield text
            scope.meter.check()
