"""VPO (arXiv 2503.20491) for images: drafts reviewed against three principles, SFT, pairs from texts and from images, DPO.

The judge of texts is the guard itself (`GuardJudge`) or a chat model (`PrincipleJudge`); that of images is any list of
yes/no checks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from valign.checks import UserError, check_options, option
from valign.data.chats import ChatPair, Conversation
from valign.data.journal import Journal
from valign.data.tasks.base import Task, TaskData
from valign.evaluation.images.prompt_checks import ImageChecks
from valign.files import hash_value
from valign.guard.guard import Guard
from valign.guard.rewriting.acceptance import recall
from valign.guard.rewriting.chat import ask, schema_of
from valign.guard.rewriting.optimizer import PRINCIPLES, TASK, optimizer_turn
from valign.models.language.chat import ChatModel
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.generation import answer_chats
from valign.models.language.loading import LoadedChat, load_chat
from valign.objectives.preference.vpo import DominancePairs
from valign.progress import track
from valign.randomness import generator_for
from valign.runs import Run
from valign.training.engine.tuning import Tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.run import prefer
from valign.training.tasks.supervised import SupervisedConfig, finetune

MOST_DROPPED = 0.5  # share of candidates without a verdict from which a build is an error


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Numbers of the recipe; the authors' where the model is not smaller for it."""

    candidates: int = option(4, help="prompts that are sampled per request for pairs", low=2)
    temperature: float = option(0.9, help="of these", above=0, high=2)
    max_tokens: int = option(96, help="of a prompt", low=8)
    sft_steps: int = option(200, help="steps of supervised training on reviewed drafts", low=1)
    sft_learning_rate: float = option(1e-4, help="of these; the authors' 2e-6 is for 8 billion parameters", above=0)
    sft_batch: int = option(16, help="drafts per step of these", low=1)
    pair_requests: int = option(0, help="requests that pairs are built from, the first ones, for images cost; 0 is all", low=0)
    raw_drafts: bool = option(False, help="SFT on drafts as they are, not reviewed (an ablation)", rare=True)
    gap: float = option(0.5, help="weighted checks by which an image must be better than another", low=0)
    feedback: str = option("both", help="what pairs come from", choices=("both", "text", "image"))
    seed: int = option(0, help="of all draws", low=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Review:
    """What a judge says of a rewritten prompt: whether it keeps the principles, and a better one where it does not."""

    good: bool
    refined: str = ""


@runtime_checkable
class PromptJudge(Protocol):
    """Judges a rewritten prompt by the principles, and mends it."""

    @property
    def name(self) -> str: ...
    def review(self, query: str, prompt: str) -> Review | None:
        """None where no verdict could be had."""
        ...


@dataclass(frozen=True)
class GuardJudge:
    """Embedded and exact: good is what passes the guard, is one caption, and keeps the query's harmless words.

    What is not good is mended: as the guard rewrites the prompt, or, where that keeps too little, the query.

    Args: keep: Share of the words of the query's own safe version that a prompt must hold.
    """

    guard: Guard
    keep: float = 0.6

    @property
    def name(self) -> str:
        """With the guard's fingerprint: a run under another policy is another run."""
        return f"guard {self.guard.fingerprint()[:12]}"

    def review(self, query: str, prompt: str) -> Review | None:
        safe = self.guard.guard(query).prompt
        if safe is None:
            return None
        if self._good(query, safe, prompt):
            return Review(True)
        try:
            mended = self.guard.guard(prompt).prompt if prompt.strip() else None
        except UserError:  # not text: control characters, as a model may write before it has learnt anything
            mended = None
        return Review(False, mended if mended and self._good(query, safe, mended) else safe)

    def _good(self, query: str, safe: str, prompt: str) -> bool:
        form = prompt == query or not self.guard.acceptor.form(query, prompt)
        return bool(prompt.strip()) and form and recall(safe, prompt) >= self.keep and self.guard.passes(prompt)


@dataclass(frozen=True)
class PrincipleJudge:
    """A chat model that reviews against the principles; query and prompt go out as JSON data."""

    chat: ChatModel
    name: str = "chat"

    def review(self, query: str, prompt: str) -> Review | None:
        system = (
            f"You review rewritten prompts of an image model. The principles: {PRINCIPLES} Say step by step what is wrong with the "
            "prompt, given the request, then a verdict, and a better prompt where the verdict is no. Answer with JSON alone: "
            '{"review": "...", "verdict": "yes" or "no", "refined": "one line, empty if the verdict is yes"}.'
        )
        text = {"type": "string"}
        schema = schema_of(review=text, verdict=text | {"enum": ["yes", "no"]}, refined=text)
        try:
            found = json.loads(ask(self.chat, system, {"request": query, "prompt": prompt}, schema))
            word = str(found["verdict"]).split()[0].strip(".,!").lower()
            refined = str(found.get("refined", "")).strip()
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        return None if word not in ("yes", "no") else Review(word == "yes", "" if word == "yes" else refined)


@dataclass(frozen=True)
class BuiltPairs:
    """Pairs of a query: (query, chosen, rejected), with what was counted."""

    pairs: tuple[tuple[str, str, str], ...]
    text: int  # of these by the judge of texts
    image: int
    dropped: int  # candidates without a verdict


def reviewed_drafts(
    queries: Sequence[str], draft: Callable[[str], str], judge: PromptJudge, *, journal: Journal | None = None
) -> list[tuple[str, str]]:
    """(query, target) for SFT: each query's draft, or its refinement where the judge finds it wanting; without a verdict, none.

    Args: journal: Keeps finished queries, so that a killed build goes on.
    """
    found = []
    for query in track(_queries(queries), "drafts"):
        key = hash_value([judge.name, query])
        if journal is None or key not in journal.entries:
            text = draft(query)
            review = judge.review(query, text)
            target = "" if review is None else text if review.good else review.refined
            if journal is not None:
                journal.add({"key": key, "query": query, "draft": text, "target": target})
        else:
            target = journal.entries[key]["target"]
        if usable(target):
            found.append((query, target))
    return found


def build_pairs(
    queries: Sequence[str],
    candidates: Callable[[str], Sequence[str]],
    judge: PromptJudge,
    *,
    images: ImageChecks | None = None,
    rule: DominancePairs | None = None,
    feedback: str = "both",
    journal: Journal | None = None,
    seed: int = 0,
) -> BuiltPairs:
    """At most one pair per query: of a bad candidate and its refinement, else of two good ones of which one's image is better.

    Args:
        candidates: Two or more prompts for a query.
        images: Checks of images of the good candidates; needed for image feedback, with ``rule``.
        journal: Keeps finished queries, so that a killed build goes on.
    Raises: UserError for too few candidates, or if over half of them got no verdict.
    """
    if feedback != "text" and (images is None or rule is None):
        raise UserError(
            f"feedback {feedback!r} must have checks of images, got none. Name a model and a detector, or choose `text`."
        )
    rows, asked, dropped = [], 0, 0
    for query in track(_queries(queries), "pairs"):
        key = hash_value([judge.name, feedback, query])
        if journal is None or key not in journal.entries:
            entry = {"key": key, **_pair(query, candidates(query), judge, images, rule, feedback, seed)}
            if journal is not None:
                journal.add(entry)
        else:
            entry = journal.entries[key]
        rows.append((query, entry))
        asked, dropped = asked + entry["asked"], dropped + entry["dropped"]
    if dropped > MOST_DROPPED * asked:
        raise UserError(f"The judge {judge.name} gave no verdict on {dropped} of {asked} prompts. Choose another judge.")
    pairs = [(query, entry["chosen"], entry["rejected"]) for query, entry in rows if entry["kind"]]
    kinds = [entry["kind"] for _, entry in rows]
    return BuiltPairs(tuple(pairs), kinds.count("text"), kinds.count("image"), dropped)


def _pair(
    query: str,
    made: Sequence[str],
    judge: PromptJudge,
    images: ImageChecks | None,
    rule: DominancePairs | None,
    feedback: str,
    seed: int,
) -> dict[str, Any]:
    if len(made) < 2:
        raise UserError(f"build_pairs.candidates must give 2 prompts or more, got {len(made)}. Raise candidates.")
    reviews = [judge.review(query, prompt) for prompt in made]
    judged = [(text, one) for text, one in zip(made, reviews) if one is not None]
    bad = [(one.refined, text) for text, one in judged if not one.good and usable(one.refined) and text != one.refined]
    good = list(dict.fromkeys(text for text, one in judged if one.good))
    entry: dict[str, Any] = {"asked": len(made), "dropped": sum(one is None for one in reviews), "kind": ""}
    if bad and feedback != "image":
        draw = np.random.default_rng([seed, *query.encode()])
        chosen, rejected = bad[int(draw.integers(len(bad)))]
        return entry | {"kind": "text", "chosen": chosen, "rejected": rejected}
    if feedback != "text" and len(good) > 1 and images is not None and rule is not None:
        found = rule(images(query, good))
        if found is not None:
            return entry | {"kind": "image", "chosen": good[found[0]], "rejected": good[found[1]]}
    return entry


def usable(text: str) -> bool:
    """One line of words, without markers of a chat template."""
    return bool(text.strip()) and "\n" not in text.strip() and "<|" not in text


def _queries(queries: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys(query.strip() for query in queries if query.strip()))
    if not found:
        raise UserError("The prompt optimizer needs requests to learn from, got none. Give a file with prompts.")
    return found


@dataclass(frozen=True)
class OptimizerResult:
    """What a finished training left behind."""

    model: str  # folder of the optimizer
    drafts: int
    pairs: int
    text_pairs: int
    image_pairs: int
    dropped: int
    held_out: int  # requests that nothing was learnt from
    good: int  # of the prompts written for these, how many the judge of texts finds good


def train_prompt_optimizer(
    model: str | Path,
    queries: Sequence[str],
    out: Path,
    judge: PromptJudge,
    draft: Callable[[str], str],
    tuning: Tuning,
    config: OptimizerConfig,
    dpo: ReinforceConfig,
    *,
    images: ImageChecks | None = None,
    rule: DominancePairs | None = None,
    judged: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> OptimizerResult:
    """SFT on reviewed drafts into ``out/sft``, pairs into ``out/pairs.jsonl``, DPO into ``out/dpo``; each resumes.

    Without a single pair (nothing that SFT writes is wanting) the SFT model is the result.
    Requests that leave no room for a prompt in the model's window are left out.

    Args: judged: What makes and judges the images (model, detector, frames, steps), JSON-able: a run resumes only with the same.
    Raises: UserError for an adapter, whose start DPO could not load, no usable draft, and as `finetune` and `prefer`.
    """
    if tuning.name.split("+")[0] != "full":
        raise UserError(f"The prompt optimizer trains whole weights, SFT and then DPO, got {tuning.name}. Use --adapter full.")
    recipe = {"config": asdict(config), "dpo": dpo.recipe(), "tuning": tuning.recipe(), "task": hash_value([TASK, PRINCIPLES])}
    run = Run.open(
        out,
        step="prompt-optimizer",
        recipe=recipe | ({"images": dict(judged)} if judged else {}),
        inputs={"queries": hash_value(_queries(queries)), "judge": hash_value(judge.name), "model": hash_value(str(model))},
        seed=config.seed,
    )
    if run.done:
        return OptimizerResult(**run.results)
    try:
        subject = ChatTaskModel(load_chat(model, device=device, dtype="float32"), max_tokens=1024, overlong="drop")
        queries = _short_enough(subject, queries, config)
    except UserError:
        run.give_up()  # another model or length may be tried in the same folder
        raise
    if config.raw_drafts:
        drafts = [(query, text) for query in queries if usable(text := draft(query))]
    else:
        drafts = reviewed_drafts(queries, draft, judge, journal=Journal(out / "drafts.jsonl"))
    rows = subject.fitting([_chat(query, target) for query, target in drafts], "draft") if drafts else []
    if len(rows) < 3:  # one is held out, and a training takes two
        raise UserError(
            f"The prompt optimizer needs 3 usable drafts or more, got {len(rows)} of {len(queries)} requests. Give more."
        )
    held = max(1, len(rows) // 20)
    kept = [query for query, target in drafts if _chat(query, target) in rows[-held:]]
    data = TaskData(Task(name="chat", kind="chat", score="loss"), tuple(rows[:-held]), tuple(rows[-held:]))
    supervised = SupervisedConfig(steps=config.sft_steps, batch_size=config.sft_batch, validate_every=0, seed=config.seed)
    rate = config.sft_learning_rate / tuning.learning_rate
    start = finetune(subject, data, out / "sft", tuning.at(rate), supervised, label="sft").adapter
    loaded = load_chat(start, device=device, dtype="float32")
    learnt = [query for query in queries if query not in set(kept)]
    built = build_pairs(
        learnt[: config.pair_requests or None],
        lambda query: sampled(loaded, query, config),
        judge,
        images=images,
        rule=rule,
        feedback=config.feedback,
        journal=Journal(out / "pairs.jsonl"),
        seed=config.seed,
    )
    pairs = [ChatPair(_chat(query, chosen), _chat(query, rejected)) for query, chosen, rejected in built.pairs]
    final = prefer(loaded, pairs, out / "dpo", tuning, dpo).adapter if pairs else start
    written = answer_chats(
        load_chat(final, device=device, dtype="float32"), [[optimizer_turn(query)] for query in kept], max_tokens=config.max_tokens
    )
    reviews = [judge.review(query, answer.text.strip()) for query, answer in zip(kept, written)]
    good = sum(review is not None and review.good for review in reviews)
    result = OptimizerResult(
        str(final), len(rows), len(pairs), built.text, built.image, built.dropped, held_out=len(kept), good=good
    )
    run.finish(**asdict(result))
    return result


def _short_enough(subject: ChatTaskModel, queries: Sequence[str], config: OptimizerConfig) -> list[str]:
    """The requests beside which a prompt fits into the model's window. Raises: UserError if there is none."""
    asked, window = _queries(queries), subject.loaded.window
    sizes = [len(subject.renderer.prompt([optimizer_turn(query)])) + config.max_tokens for query in asked]
    found = [query for query, size in zip(asked, sizes) if window is None or size <= window]
    if not found:
        raise UserError(
            f"Requests must leave room for {config.max_tokens} tokens of prompt in the model's {window}, got none of {len(asked)}. "
            "Lower --max-tokens, shorten them, or choose another model."
        )
    return found


def sampled(loaded: LoadedChat, query: str, config: OptimizerConfig) -> list[str]:
    """``config.candidates`` prompts that the model writes for the query."""
    seed = generator_for("vpo", config.seed, query).initial_seed()
    chats = [[optimizer_turn(query)]] * config.candidates
    answers = answer_chats(loaded, chats, max_tokens=config.max_tokens, temperature=config.temperature, seed=seed)
    return [answer.text.strip() for answer in answers]


def _chat(query: str, answer: str) -> Conversation:
    return Conversation((("user", optimizer_turn(query)["content"]), ("assistant", answer)))
