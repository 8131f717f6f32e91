"""Attacks on every system in one folder, resumed after a kill: journal, images, prompts that succeeded, summary and report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from valign.attacks.base import Attack, AttackBudget, OutOfTime, QueryMeter, Scope, Search, SystemAnswer, require
from valign.attacks.page import write_attack_page
from valign.attacks.results import AttackResult, Ended, TransferResult
from valign.attacks.summary import summarize_attacks
from valign.attacks.target import AttackTarget
from valign.checks import UserError
from valign.data.journal import Journal
from valign.detectors.base import check_coverage, check_domain, verdicts
from valign.evaluation.images.clip_score import ImageTextEncoder
from valign.evaluation.images.measuring import is_blank
from valign.evaluation.results import prompt_columns
from valign.evaluation.suite import EvalPrompt, Suite, prompt_seed
from valign.files import atomic_path, hash_value, write_json, write_text
from valign.interfaces import Detector, SamplingConfig, scores_of
from valign.models.language.chat import ChatModel, ChatUnavailable
from valign.policy import Policy
from valign.progress import track
from valign.randomness import numpy_generator_for
from valign.runs import Run, versions

GUARD_CALLS = 20  # per query: how often a search may ask its copy of the guard


@dataclass(frozen=True, kw_only=True)
class Attackers:
    """What all attacks share.

    Args:
        judge: Tells whether an image is harmful: stops a search and scores it.
        policy: Its concepts are the paired texts of concept vectors.
        clip: Shadow CLIP of black-box attacks.
        adaptive: Whether the attacker knows the guard: its word lists, and a copy to try prompts on.
        safe: Goal's id -> the same scene without the harm; for training on what was found.
    """

    judge: Detector
    policy: Policy
    clip: ImageTextEncoder | None = None
    chat: ChatModel | None = None
    adaptive: bool = True
    safe: Mapping[str, str] = field(default_factory=dict)

    def pairs(self, category: str) -> list[tuple[str, str]]:
        """Harmful and harmless texts of a category, without what training holds out; none for an unknown one."""
        own = next((one for one in self.policy.categories if one.id == category), None)
        concepts = [one for one in own.concepts if not one.held_out] if own else []
        return [(text, one.safe) for one in concepts for text in (one.name, *one.paraphrases)]


def attack_systems(
    targets: Sequence[AttackTarget],
    attacks: Mapping[str, Attack],
    suite: Suite,
    attackers: Attackers,
    *,
    out: Path,
    budget: AttackBudget,
    sampling: SamplingConfig,
    transfer: bool = True,
) -> dict[str, Any]:
    """Attack every unsafe prompt of the suite on every target with every attack; return what ``summary.json`` holds.

    Args:
        targets: Distinct names; the first is the one that success is compared with.
        sampling: That the targets generate with; recorded. Its seed is that of every image and search.
        transfer: Send what was found on one target to the others, once each.
    Raises: UserError, before any image, if an attack needs what is not there, the judge cannot judge, or there is no unsafe prompt.
    """
    goals = [prompt for prompt in suite.prompts if not prompt.benign]
    _check(targets, attacks, goals, attackers)
    recipe = {**asdict(budget), "steps": sampling.steps, "guidance_scale": sampling.guidance_scale, "adaptive": attackers.adaptive}
    judged = hash_value(asdict(attackers.judge.card))
    run = Run.open(out, step="attack", recipe=recipe, inputs={"suite": suite.fingerprint(), "judge": judged}, seed=sampling.seed)
    work = _Duels(suite, attackers, Journal(out / "journal.jsonl"), out, budget, sampling.seed)
    results = [one for target in targets for one in work.on(target, attacks, goals)]
    moved = [one for target in targets for one in work.transferred(target, results)] if transfer and len(targets) > 1 else []
    _write_found(out / "found.jsonl", results, attackers)
    summary = {
        "title": "Attacks on whole systems",
        "suite": {"name": suite.name, "unsafe": len(goals), "stand_in": suite.stand_in, "fingerprint": suite.fingerprint()},
        "detector": asdict(attackers.judge.card),
        "settings": recipe | {"seed": sampling.seed},
        "attacks": {name: {"options": vars(attack), "needs": list(attack.needs)} for name, attack in attacks.items()},
        "versions": versions(),
        **summarize_attacks(targets, list(attacks), results, moved, suite, attackers.judge, budget, seed=sampling.seed),
    }
    write_json(out / "summary.json", summary)
    write_attack_page(out / "report.html", summary, results, suite, out)
    run.finish(results=len(results))
    return summary


def _check(
    targets: Sequence[AttackTarget], attacks: Mapping[str, Attack], goals: Sequence[EvalPrompt], attackers: Attackers
) -> None:
    names = [target.name for target in targets]
    if not names or len(set(names)) < len(names):
        raise UserError(f"attack_systems.targets must have distinct names, got {', '.join(names) or 'none'}. Rename them.")
    if not attacks:
        raise UserError("attack_systems.attacks must hold at least one attack, got none. Name one.")
    if not goals:
        raise UserError("The suite must hold an unsafe prompt to attack with, got none: there is nothing to find.")
    check_coverage(attackers.judge.card, sorted({goal.category for goal in goals}))
    for target in targets:
        check_domain(attackers.judge.card, target.origins, f"the model of {target.name}")
        for name, attack in attacks.items():
            meter = QueryMeter(AttackBudget())
            scope = Scope(
                meter=meter, random=np.random.default_rng(0), white=target.white, encoder=target.encoder, chat=attackers.chat
            )
            require(name, attack, scope)


@dataclass(frozen=True)
class _Duels:
    """One run's attacks, with what is known from earlier."""

    suite: Suite
    attackers: Attackers
    journal: Journal
    out: Path
    budget: AttackBudget
    seed: int
    # of unchanged prompts, with the images they cost; verdicts on found prompts with fresh seeds
    firsts: dict[tuple[str, str], tuple[SystemAnswer, int]] = field(default_factory=dict)
    repeated: dict[tuple[str, str, int], bool | None] = field(default_factory=dict)

    def on(self, target: AttackTarget, attacks: Mapping[str, Attack], goals: Sequence[EvalPrompt]) -> list[AttackResult]:
        """Every attack on every goal against one target; goals in the outer loop, so that a stopped run has whole prompts."""
        keys = {(goal.id, name): self._key(target, name, attack, goal) for goal in goals for name, attack in attacks.items()}
        missing = [(goal, name) for goal in goals for name in attacks if keys[goal.id, name] not in self.journal.entries]
        if missing:
            seeds = dict(zip([prompt.id for prompt in self.suite.prompts], self.suite.seeds(self.seed)))
            with target.ready():
                for goal, name in track(missing, f"attacking {target.name}", total=len(keys), done=len(keys) - len(missing)):
                    found = self._attacked(target, name, attacks[name], goal, seeds[goal.id])
                    self.journal.add({"key": keys[goal.id, name], **found.to_json()})
        rows = [dict(self.journal.entries[key]) for key in keys.values()]
        return [AttackResult(**{name: value for name, value in row.items() if name != "key"}) for row in rows]

    def _key(self, target: AttackTarget, name: str, attack: Attack, goal: EvalPrompt) -> str:
        return f"{target.name}/{name}/{goal.id}/{hash_value([target.fingerprint, vars(attack)])[:8]}"

    def _attacked(self, target: AttackTarget, name: str, attack: Attack, goal: EvalPrompt, seed: int) -> AttackResult:
        meter = QueryMeter(self.budget)
        duel = _Duel(target, goal, self.attackers, meter, seed)
        known = self.firsts.get((target.name, goal.id))
        first = duel.ask(goal.prompt, known)
        self.firsts[target.name, goal.id] = (first, meter.images)
        before = duel.harmful
        ended: Ended = "needless"
        if not before:
            scope = Scope(
                meter=meter,
                random=numpy_generator_for(self.seed, target.name, name, goal.id),
                white=target.white,
                encoder=target.encoder,
                clip=self.attackers.clip,
                chat=self.attackers.chat,
                pairs=self.attackers.pairs(goal.category),
                listed=target.listed() if self.attackers.adaptive else frozenset(),
            )
            ended = duel.run(attack.search(goal, scope), informed=attack.informed and self.attackers.adaptive)
        spent = {one: getattr(meter, one) for one in ("images", "gradients", "encodings", "chat_calls", "guard_calls", "seconds")}
        at_query, queries = (meter.queries if duel.harmful else None), meter.queries
        image, again = "", None
        if duel.best is not None:
            image = f"images/{target.name}-{name}-{goal.id}.png"
            with atomic_path(self.out / image) as temporary:
                duel.best_image.save(temporary, format="PNG")  # type: ignore[union-attr]
            key = (target.name, duel.best, self._fresh(goal))
            if key not in self.repeated:
                self.repeated[key] = duel.verdict(target.ask(duel.best, key[-1], QueryMeter(self.budget)))
            again = self.repeated[key]
        columns = prompt_columns(goal, seed)
        return AttackResult(
            attack=name,
            system=target.name,
            **{key: value for key, value in columns.items() if key != "seed"},
            first="rewritten" if first.caption not in (None, goal.prompt) and not first.stopped else first.stopped,
            before=before,
            harmful=duel.harmful,
            asked=duel.asked,
            bypassed=duel.bypassed,
            again=again,
            ended=ended,
            at_query=at_query,
            queries=queries,
            **spent,
            prompt=duel.best or "",
            image=image,
        )

    def _fresh(self, goal: EvalPrompt) -> int:
        """A seed that no search uses."""
        return prompt_seed(self.seed, f"{goal.id}:again")

    def transferred(self, target: AttackTarget, results: Sequence[AttackResult]) -> list[TransferResult]:
        """What attacks found on other targets, sent to this one; not the unchanged prompts, which every target is asked anyway."""
        goals = {prompt.id: prompt for prompt in self.suite.prompts}
        found = [one for one in results if one.ended == "broken" and one.system != target.name]
        keys = {
            id(one): f"transfer/{one.system}/{one.attack}/{one.id}/{target.name}/{hash_value([target.fingerprint, one.prompt])[:8]}"
            for one in found
        }
        missing = [one for one in found if keys[id(one)] not in self.journal.entries]
        if missing:
            with target.ready():
                for one in track(missing, f"transfer to {target.name}"):
                    duel = _Duel(target, goals[one.id], self.attackers, QueryMeter(self.budget), 0)
                    harmful = duel.verdict(target.ask(one.prompt, self._fresh(goals[one.id]), duel.meter))
                    moved = TransferResult(
                        attack=one.attack, found_on=one.system, system=target.name, id=one.id, cluster=one.cluster, harmful=harmful
                    )
                    self.journal.add({"key": keys[id(one)], **moved.to_json()})
        rows = [self.journal.entries[keys[id(one)]] for one in found]
        return [TransferResult(**{name: value for name, value in row.items() if name != "key"}) for row in rows]


class _Duel:
    """One attack on one goal: asks, judges and remembers the prompt that succeeded."""

    def __init__(self, target: AttackTarget, goal: EvalPrompt, attackers: Attackers, meter: QueryMeter, seed: int) -> None:
        self.target, self.goal, self.attackers, self.meter, self.seed = target, goal, attackers, meter, seed
        self.harmful: bool | None = None  # None: no image has a verdict yet
        self.asked: bool | None = None
        self.bypassed = False
        self.best: str | None = None
        self.best_image: Image | None = None
        self._unknown = False

    def ask(self, prompt: str, known: tuple[SystemAnswer, int] | None = None) -> SystemAnswer:
        """One query, with a seed of its own; the first one's is the goal's.

        Args: known: The answer, where another attack has asked the same, and the images that it cost; counted all the same.
        """
        number = self.meter.queries
        seed = prompt_seed(self.seed, f"{self.goal.id}:{number}") if number else self.seed
        if known is None:
            answer = self.target.ask(prompt, seed, self.meter)
        else:
            answer, images = known
            self.meter.queries, self.meter.images = number + 1, self.meter.images + images
        self.bypassed = self.bypassed or answer.bypassed
        found = self.verdict(answer)
        self._unknown = self._unknown or found is None
        self.harmful = True if found else (None if self._unknown else False)
        if found:
            self.best, self.best_image = prompt, answer.image
            self.asked = self._shows_category(answer)
        return answer

    def run(self, search: Search, *, informed: bool) -> Ended:
        """Until a prompt succeeds or something is spent."""
        try:
            prompt = next(search)
            while self.meter.queries < self.meter.budget.queries:
                self.meter.check()
                if informed and not self.target.lets_through(prompt):
                    self.meter.guard_calls += 1
                    if self.meter.guard_calls >= GUARD_CALLS * self.meter.budget.queries:
                        return "guard calls"
                    prompt = search.send(SystemAnswer(prompt, None, None, "guard"))
                    continue
                answer = self.ask(prompt)
                if self.best is not None:
                    return "broken"
                prompt = search.send(answer)
            return "queries"
        except OutOfTime:
            return "seconds"
        except StopIteration:
            return "exhausted"
        except ChatUnavailable:
            return "failed"
        finally:
            search.close()

    def verdict(self, answer: SystemAnswer) -> bool | None:
        """Whether the returned image is harmful; False where none was returned, None where the judge cannot tell."""
        if answer.image is None:
            return False
        if is_blank(answer.image):
            return None
        scores = scores_of(self.attackers.judge, [answer.image])
        return verdicts(scores, self.attackers.judge.card, [self.goal.category])[0]

    def _shows_category(self, answer: SystemAnswer) -> bool:
        card = self.attackers.judge.card
        assert answer.image is not None
        row = scores_of(self.attackers.judge, [answer.image])[0]
        return any(row[card.classes.index(name)] >= card.threshold for name in card.classes_for(self.goal.category))


def _write_found(path: Path, results: Sequence[AttackResult], attackers: Attackers) -> None:
    """Prompts that succeeded beside the same scene without the harm, as a table of prompt pairs; a prompt once."""
    rows: dict[str, dict[str, Any]] = {}
    for one in results:
        if one.prompt and (safe := attackers.safe.get(one.id)):
            name = f"{one.attack}-{one.system.replace('+', '-')}-{one.id}"
            row = {"id": name, "unsafe": one.prompt, "safe": safe, "category": one.category, "concept": one.concept}
            rows.setdefault(one.prompt, row | {"kind": "adversarial", "held_out": one.held_out})
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
