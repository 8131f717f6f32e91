"""Attacks on a prompt guard, a model, an adapter and an image check as one system: one file each, one row each in `ATTACKS`."""

from valign.attacks.base import Attack
from valign.attacks.best_of_n import BestOfN
from valign.attacks.look_alikes import LookAlikes
from valign.attacks.mma import MMA
from valign.attacks.p4d import P4D
from valign.attacks.paraphrase import Paraphrase
from valign.attacks.ring_a_bell import RingABell
from valign.attacks.sneaky_prompt import SneakyPrompt
from valign.attacks.unlearn_diff import UnlearnDiffAtk

ATTACKS: dict[str, type[Attack]] = {
    "best-of-n": BestOfN,
    "look-alikes": LookAlikes,
    "sneaky-prompt": SneakyPrompt,
    "mma": MMA,
    "ring-a-bell": RingABell,
    "p4d": P4D,
    "unlearn-diff-atk": UnlearnDiffAtk,
    "paraphrase": Paraphrase,
}
