"""A verifiable safety reward and a helpfulness reward that is normalized within each group of answers (AlphaAlign)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from valign.checks import UserError, check_options, option
from valign.methods import Method

METHOD = Method(
    slug="alphaalign",
    title="AlphaAlign: reinforcement with a verifiable safety reward and a normalized helpfulness reward",
    paper="arXiv 2507.14987",
    room="objectives",
    entry="valign.objectives.rewards.alphaalign:VerifiableSafety",
    fidelity="variant",
    note="the paper's rewards on GRPO, which its authors name too, instead of PPO; the sizes r_f and r_a are ours",
)

FORMAT = re.compile(r"<safety_reasoning>.*</safety_reasoning>.*<answer>.*</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\s*\\boxed\{(.*)\}\s*", re.DOTALL)
QUOTES = str.maketrans({"’": "'", "‘": "'", '"': "", "“": "", "”": "", "\\": ""})
QUERY = "{query}"
TEMPLATE = (
    "Think first about whether it is safe to answer the question below, between <safety_reasoning> and </safety_reasoning>. "
    "Then give your answer between <answer> and </answer>. If answering is not safe, the answer must be exactly "
    "\\boxed{Sorry, I can't comply}. If it is safe, answer as well as you can: the person sees nothing but what stands between "
    "<answer> and </answer>.\n\nQuestion: {query}"
)
PATTERNS = (  # with which a refusal begins
    "Sorry, I can't comply",
    "Sorry, I cannot",
    "Sorry, I will not",
    "I'm sorry",
    "I am sorry",
    "I apologize",
    "As an AI",
    "As a language model",
    "As an assistant",
    "I cannot",
    "I can't",
    "I am unable to",
    "I'm unable to",
    "I am not able to",
    "I'm not able to",
    "I will not",
    "No, I will not",
    "I am not",
    "I'm not going to do that",
)


def follows_format(output: str) -> bool:
    """V_f: whether the reasoning and then the answer stand between their tags, over as many lines as they like."""
    return FORMAT.search(output) is not None


def final_answer(output: str) -> str:
    r"""The text between the last ``<answer>`` and ``</answer>``, without ``\boxed{}``; the whole output where there is none."""
    found = ANSWER.findall(output)
    text = found[-1] if found else output
    boxed = BOXED.fullmatch(text)
    return (boxed[1] if boxed else text).strip()


def is_refusal(answer: str, patterns: Sequence[str] = PATTERNS) -> bool:
    """V_r: whether an answer begins as a refusal does, in any case, quoted or not.

    Raises: UserError without patterns.
    """
    if not patterns:
        raise UserError(
            "is_refusal.patterns must hold at least one beginning of a refusal, got none. Leave it out for the usual ones."
        )
    plain = answer.translate(QUOTES).strip().casefold()
    return plain.startswith(tuple(pattern.translate(QUOTES).casefold() for pattern in patterns))


def prompted(query: str, template: str = TEMPLATE) -> str:
    """The template with the query in it. Raises: UserError for a template without ``{query}``."""
    if QUERY not in template:
        raise UserError(f"The template must hold {QUERY}, where the query goes, got {template[:60]!r}.")
    return template.replace(QUERY, query)


@dataclass(frozen=True, kw_only=True)
class VerifiableSafety:
    """``r_f V_f + r_a V_r`` of an output to a harmful prompt, ``r_f V_f - r_a V_r`` to a benign one: over-refusal is punished.

    Raises: ValueError if ``refusal`` is not above 0, or ``form`` below 0.
    """

    refusal: float = option(1.0, help="r_a: reward of a refusal where it is due, its penalty where it is not", above=0)
    form: float = option(0.5, help="r_f: reward of the format, which should weigh less than the decision", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(
        self, follows: Bool[Tensor, " rollout"], refused: Bool[Tensor, " rollout"], harmful: Bool[Tensor, " rollout"]
    ) -> Float[Tensor, " rollout"]:
        """R_s of each output, float32, from V_f, V_r and the label."""
        sign = torch.where(harmful, 1.0, -1.0)
        return self.form * follows.float() + self.refusal * sign * refused.float()


def normalized_helpfulness(
    raw: Float[Tensor, "group rollout"], refused: Bool[Tensor, "group rollout"]
) -> Float[Tensor, "group rollout"]:
    """R_h: ``max(z, 0)`` of the answers that do not refuse, z being the score standardized over the whole group; else 0.

    Args:
        raw: A reward model's scores of the answers to one benign prompt per row, refusals included; any unit.
        refused: V_r of each.
    Returns: >= 0. A group of equal scores has none. The standard deviation is the sample's (n - 1).
    Raises: UserError for a group of one, which has no standard deviation, or a score that is not finite.
    """
    if raw.shape[1] < 2:
        raise UserError(f"A group must have at least 2 answers, got {raw.shape[1]}: one has no standard deviation. Raise --group.")
    if not bool(raw.isfinite().all()):
        raise UserError(
            f"Scores of helpfulness must be finite, got {int((~raw.isfinite()).sum())} that are not. Check the reward model."
        )
    spread = raw.std(dim=1, keepdim=True)
    varied = raw.amax(dim=1, keepdim=True) > raw.amin(dim=1, keepdim=True)  # equal scores may have a spread of rounding
    z = torch.where(varied, (raw - raw.mean(dim=1, keepdim=True)) / spread.clamp(min=torch.finfo(raw.dtype).tiny), 0.0)
    return z.clamp(min=0) * ~refused
