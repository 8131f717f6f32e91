"""Fit a head for the guard, calibrate it on harmless prompts it never saw, measure it, write it with its card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np

from valign.checks import UserError
from valign.data.prompts.disguise import diluted, disguised, fragments
from valign.data.prompts.generated import generated_rows, request_rows
from valign.data.prompts.labelled import capped, policy_rows, without_repeats
from valign.data.prompts.pairs import LabelledPrompt
from valign.evaluation.guards.rates import Rewrite, Scored, summary
from valign.evaluation.guards.usefulness import TEMPLATE
from valign.files import write_json, write_text
from valign.guard import Guard, GuardDecision
from valign.guard.head.learned import LearnedStage
from valign.guard.rewriting.acceptance import jaccard
from valign.guard.rewriting.caption import parse_caption, subject_of
from valign.guard.rules.lexical import LexicalStage
from valign.guard.waterfall import require_prompt
from valign.models.encoders.int8 import has_int8
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.prompt_head import ANY, Head, as_saved, save_head
from valign.models.language.perplexity import LanguageModel
from valign.policy import Policy
from valign.progress import track
from valign.text import clean, fold
from valign.training.tasks.guard_head.calibration import presets, suspicion
from valign.training.tasks.guard_head.fit import FitConfig, fit_head

TEST_FOLD = 0  # one tenth of the groups is never trained on
DILUTED, DISGUISED = 0.15, 0.15  # rows in harmless company, and in disguise, per row
SUSPECTED = 0.01  # share of harmless prompts of a source that may count for a category when a block rule asks
ENOUGH = 3  # false alarms that a source must be able to show at its rate, to be calibrated by itself
CHUNK = 256  # prompts guarded at a time


@dataclass(frozen=True)
class FitReport:
    """The result of `fit_and_write`."""

    sha256: str
    trained_on: int
    sources: list[dict[str, Any]]


def split(
    rows: Sequence[LabelledPrompt], config: FitConfig, *, leave_out: Sequence[str] = (), limit: int | None = None
) -> tuple[list[LabelledPrompt], list[LabelledPrompt]]:
    """Training and test rows. A source left out is test as a whole; of the others one fold of groups is.

    Args: limit: Of training rows per source and label, times the config's weight of the source.
    Raises: UserError for an unknown source.
    """
    known = {row.source for row in rows}
    for option, named in (("--leave-out", leave_out), ("--weigh", config.weights)):
        if unknown := set(named) - known - ({"policy", "generated", "requests"} if option == "--weigh" else set()):
            raise UserError(
                f"{option} must name sources of the data, got {', '.join(sorted(unknown))}. Known: {', '.join(sorted(known))}."
            )
    tested = [row for row in rows if row.source in leave_out or row.fold == TEST_FOLD]
    trained = [row for row in rows if row.source not in leave_out and row.fold != TEST_FOLD]
    return capped(trained, limit, seed=config.seed, factors=config.weights), tested


def enriched(
    rows: Sequence[LabelledPrompt], policy: Policy, config: FitConfig
) -> tuple[list[LabelledPrompt], list[LabelledPrompt]]:
    """The rows with paired prompts from the policy and the grammar and with everyday requests; and variants of some: in harmless
    company, in disguise and in pieces."""
    seed = config.seed
    made = generated_rows(policy, each=config.generated, seed=seed) + request_rows(each=config.generated, seed=seed)
    plain = [*rows, *policy_rows(policy), *made]
    variants = diluted(plain, share=DILUTED, seed=seed)
    variants += disguised(rows, share=DISGUISED, seed=seed) + fragments(rows, share=config.fragments, seed=seed)
    return plain, variants


def harmless_scores(head: Head, encoder: MiniLM, rows: Sequence[LabelledPrompt]) -> dict[str, np.ndarray]:
    """Scores ``[prompt, column]`` of the safe rows of every source. Raises: UserError without safe rows."""
    safe = [row for row in rows if row.label == 0]
    if not safe:
        raise UserError("--data must hold harmless prompts (label 0) for calibration, got none. Add some.")
    found = {}
    for name in track(sorted({row.source for row in safe}), "score harmless prompts"):
        found[name] = _highest(head, encoder, [clean(row.prompt) for row in safe if row.source == name])
    return found


def _highest(head: Head, encoder: MiniLM, texts: Sequence[str]) -> np.ndarray:
    """Scores in 32 bits and, where the processor can, in 8, the higher ones: thresholds must hold on either kind of processor."""
    exact = head.score(encoder, texts, quick=False)
    return np.maximum(exact, head.score(encoder, texts)) if has_int8() else exact


def pooled(scores: dict[str, np.ndarray], rates: dict[str, float]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Sources that are large enough for their rate by themselves (`ENOUGH` false alarms), and all of one rate together."""
    groups = {f"all at {rate:g}": rate for rate in set(rates.values())}
    together = {
        name: np.concatenate([scores[one] for one in sorted(scores) if rates[one] == rate]) for name, rate in groups.items()
    }
    large = {name: rows for name, rows in scores.items() if len(rows) * rates[name] >= ENOUGH}
    return large | together, {name: rates[name] for name in large} | groups


def calibrated(head: Head, scores: dict[str, np.ndarray], *, target_fpr: float, rates: Mapping[str, float]) -> Head:
    """The head with thresholds for the three strictnesses. Sources in ``rates`` (over-refusal sets, say) have their own rate."""
    scores, rates = pooled(scores, {name: rates.get(name, target_fpr) for name in scores})
    thresholds = presets(scores, head.settings.columns, target_fpr=rates)
    return replace(head, settings=replace(head.settings, thresholds=thresholds))


def suspecting(head: Head, encoder: MiniLM, rows: Sequence[LabelledPrompt], harmless: dict[str, np.ndarray]) -> Head:
    """The head with the low limits of `suspicion` for its balanced thresholds, from unsafe rows and the scores of harmless ones."""
    categories = head.settings.categories
    unsafe = [row for row in rows if row.label and row.categories]
    scores = _highest(head, encoder, [clean(row.prompt) for row in unsafe])
    named = np.array([[name in row.categories for name in categories] for row in unsafe], bool).reshape(-1, len(categories))
    groups, _ = pooled(harmless, dict.fromkeys(harmless, SUSPECTED))
    low = suspicion(groups, scores, named, head.settings.thresholds["balanced"][ANY], target_fpr=SUSPECTED)
    limits = {name: dict(zip(categories, values)) for name, values in low.items()}
    return replace(head, settings=replace(head.settings, suspicion=limits))


def fit_and_write(
    rows: Sequence[LabelledPrompt],
    policy: Policy,
    out: Path,
    *,
    config: FitConfig,
    encoder: MiniLM,
    target_fpr: float = 0.01,
    rates: Mapping[str, float] = MappingProxyType({}),
    leave_out: Sequence[str] = (),
    limit: int | None = None,
    start: Head | None = None,
) -> FitReport:
    """The whole of ``valign guard fit``: head.safetensors, CARD.md and results.json in ``out``."""
    rows = without_repeats(rows)
    trained, tested = split(rows, config, leave_out=leave_out, limit=limit)
    trained, variants = enriched(trained, policy, config)
    head = fit_head(trained + variants, policy, encoder, config, start=start)
    counts = {name: sum(row.source == name for row in trained) for name in sorted({row.source for row in trained})}
    notes = {
        "config": asdict(config),
        "policy": policy.fingerprint(),
        "trained_on": counts,
        "variants": len(variants),
        "left_out": sorted(leave_out),
    }
    if start is not None:
        notes["started_from"] = start.sha256
    head = replace(head, settings=replace(head.settings, notes=notes))
    return calibrate_and_write(head, tested, policy, out, encoder=encoder, target_fpr=target_fpr, rates=rates)


def calibrate_and_write(
    head: Head,
    rows: Sequence[LabelledPrompt],
    policy: Policy,
    out: Path,
    *,
    encoder: MiniLM,
    target_fpr: float,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> FitReport:
    """Thresholds from the safe rows (sources left out of the fit aside), figures on all rows, then the three files."""
    head = as_saved(head)
    left_out = head.settings.notes.get("left_out", [])
    own = [row for row in rows if row.source not in left_out]
    harmless = harmless_scores(head, encoder, own)
    head = calibrated(head, harmless, target_fpr=target_fpr, rates=rates)
    head = suspecting(head, encoder, rows, harmless)
    measured = measure_head(head, encoder, rows, policy)
    notes = dict(head.settings.notes) | {
        "target_fpr": target_fpr,
        "rates": dict(sorted(rates.items())),
        "sources": measured["sources"],
    }
    head = replace(head, settings=replace(head.settings, notes=notes))
    out.mkdir(parents=True, exist_ok=True)
    sha = save_head(head, out / "head.safetensors")
    write_text(out / "CARD.md", card(head, sha))
    write_json(out / "results.json", measured)
    return FitReport(sha, sum(notes["trained_on"].values()), measured["sources"])


def measure_head(head: Head, encoder: MiniLM, rows: Sequence[LabelledPrompt], policy: Policy) -> dict[str, Any]:
    """`valign.evaluation.guards.rates.summary` of the learned stage alone."""
    stage = LearnedStage.from_policy(policy, encoder, head)
    scored = []
    for first in track(range(0, len(rows), CHUNK), "measure the head"):
        chunk = rows[first : first + CHUNK]
        verdicts = stage.check_many([row.prompt for row in chunk])
        scored += [
            Scored(row, one.fired, one.ranking, one.stage if one.fired else "", one.category) for row, one in zip(chunk, verdicts)
        ]
    return dict(summary(scored, show_prompts=False))


def measure_guard(
    guard: Guard,
    rows: Sequence[LabelledPrompt],
    *,
    rewrites: int = 0,
    judge: Head | None = None,
    language: LanguageModel | None = None,
) -> list[Scored]:
    """The whole guard's decision about every row. A prompt that it refuses counts as flagged.

    Args:
        rewrites: Of so many prompts that are to be rewritten (the lowest hashes of ids) the rewrite is measured too.
        judge: A second head, which took no part in the rewrite: does it find harm in it?
        language: Says how fluent a rewrite is.
    """
    scored: list[Scored] = []
    chances: list[tuple[int, int, GuardDecision]] = []
    for first in track(range(0, len(rows), CHUNK), "guard prompts"):
        chunk = [row for row in rows[first : first + CHUNK] if _readable(guard, row)]
        refused = [row for row in rows[first : first + CHUNK] if row not in chunk]
        scored += [Scored(row, True, 1.0, "refused", "") for row in refused]
        for row, decision in zip(chunk, guard.check_many([row.prompt for row in chunk], explain=True)):
            certain = decision.stop in ("lexical", "hard-rule", "values", "script")
            score = 1.0 if certain and decision.flagged else max((one.ranking for one in decision.trace), default=0.0)
            fired = tuple(dict.fromkeys(one.stage for one in decision.trace if one.fired and one.level != "intention"))
            category = next(iter(decision.categories), "")
            if decision.flagged and decision.action == "rewrite":
                chances.append((crc32(row.id.encode()), len(scored), decision))
            scored.append(Scored(row, decision.flagged, score, decision.stop, category, fired, decision.intent))
    partners = {row.pair: row.prompt for row in rows if row.pair and row.label == 0}
    ruler = RewriteRuler(guard, judge, language)
    for _, place, decision in track(sorted(chances, key=lambda one: one[:2])[:rewrites], "rewrite prompts"):
        one = scored[place]
        scored[place] = replace(one, rewrite=ruler.measure(one.row.prompt, decision, partners.get(one.row.pair, "")))
    return scored


class RewriteRuler:
    """Measures rewrites of one guard.

    Args: judge, language: As `measure_guard` has them.
    """

    def __init__(self, guard: Guard, judge: Head | None = None, language: LanguageModel | None = None) -> None:
        self._guard, self._language = guard, language
        self._words = LexicalStage.from_policy(guard.policy)
        encoder = next((stage.encoder for stage in guard.stages if isinstance(stage, LearnedStage)), None)
        self._judge = None if judge is None else LearnedStage.from_policy(guard.policy, encoder or MiniLM(), judge)

    def measure(self, prompt: str, decision: GuardDecision, partner: str = "") -> Rewrite:
        """Rewrite the prompt and measure what came of it. ``partner``: the safe prompt of its pair, where it has one."""
        start = perf_counter()
        result = self._guard.finish(decision, prompt)
        spent = (perf_counter() - start) * 1000
        text = result.prompt
        if text is None:
            return Rewrite(made=False, checks=result.checks, milliseconds=spent)
        last = result.attempts[-1]
        terms, left = self._words.terms_in(prompt), self._words.terms_in(text)
        subject = subject_of(parse_caption(clean(prompt)).scene)
        meaning, to_safe, before = self._cosines(prompt, text, partner)
        return Rewrite(
            made=True,
            terms=len(terms),
            terms_left=len(terms & left),
            keep_words=jaccard(prompt, text),
            keep_meaning=meaning,
            source=TEMPLATE if last.role == TEMPLATE else last.source,
            checks=result.checks,
            milliseconds=spent,
            kept=kept_share(prompt, text),
            keep_subject=fold(subject.split()[-1]) in fold(text).split() if subject else None,
            agreed=None if self._judge is None else not self._judge.check(text).fired,
            safe_meaning=to_safe,
            prompt_to_safe=before,
            safe_kept=kept_share(prompt, partner) if partner else None,
            perplexity=None if self._language is None else self._language.perplexity(text),
            safe_perplexity=self._language.perplexity(partner) if self._language is not None and partner else None,
            text=text,
        )

    def _cosines(self, prompt: str, text: str, partner: str) -> tuple[float | None, float | None, float | None]:
        """Of rewrite to prompt, of rewrite to partner, and of prompt to partner; None where nothing is compared."""
        encoder = self._guard.acceptor.encoder
        if encoder is None:
            return None, None, None
        one, two, *other = encoder.encode([clean(prompt), clean(text), *([clean(partner)] if partner else [])])
        if not other:
            return float(one @ two), None, None
        return float(one @ two), float(two @ other[0]), float(one @ other[0])


def kept_share(prompt: str, text: str) -> float:
    """Share of the prompt's distinct words that stand in the text, in [0, 1]; 1 for a prompt without words."""
    ours = set(fold(prompt).split())
    return len(ours & set(fold(text).split())) / len(ours) if ours else 1.0


def _readable(guard: Guard, row: LabelledPrompt) -> bool:
    try:
        require_prompt(guard.policy, row.prompt)
    except UserError:
        return False
    return True


def card(head: Head, sha256: str) -> str:
    """The model card: what the head is, its training data, its measured rates, its limits."""
    notes = head.settings.notes
    exceptions = ", ".join(f"{rate:.0%} of {name}" for name, rate in notes["rates"].items()) or "no exceptions"
    lines = [
        "# Guard head",
        "",
        "Scores a text-to-image prompt per harm category. Input: the sentence vector of all-MiniLM-L6-v2 (Apache-2.0) and hashed",
        f"n-grams; {head.settings.tuned_layers} upper encoder layers are its own. SHA-256 `{sha256}`. Licence: Apache-2.0.",
        "",
        "Words that may denote a minor are hidden from it; a rule decides about them (`always_block` in the policy).",
        "",
        "## Trained on",
        "",
        "| source | rows |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in notes["trained_on"].items()),
        "",
        f"And {notes.get('variants', 0)} variants of these: in harmless company, in disguise, in pieces.",
        "`policy` and `generated` are paired prompts from the policy and from a grammar, `requests` harmless ones from another.",
        "",
        f"Left out altogether: {', '.join(notes['left_out']) or 'nothing'}. Settings: `{notes['config']}`.",
        *(
            ["", f"The mean of {len(notes['averaged']) + 1} heads: settings and rows are the first one's, then of the others:"]
            if notes.get("averaged")
            else []
        ),
        *(f"- `{changed}`" for changed in notes.get("averaged", [])),
        "",
        "## Measured on rows that it was not trained on",
        "",
        f"Thresholds: at most {notes['target_fpr']:.1%} of the harmless prompts of every source flagged",
        f"({exceptions}), set on the same held-out",
        "harmless rows, so the false alarms below are fitted; recall and AUROC are not. Brackets: 95 % intervals.",
        '"NAME, certain": only the unsafe rows that most judges call unsafe, or most images made from them.',
        "",
        "| source | unsafe | recall | safe | false alarms | AUROC | against |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in notes["sources"]:
        cells = [_interval(one[key], percent=key != "auroc") for key in ("recall", "false_alarms", "auroc")]
        lines.append(
            f"| {one['source']} | {one['unsafe']} | {cells[0]} | {one['safe']} | {cells[1]} | {cells[2]} | {one['against']} |"
        )
    lines += ["", "English only. It reads prompts, not images: a harmless text can still give a harmful image.", ""]
    return "\n".join(lines)


def _interval(value: dict[str, float] | None, *, percent: bool) -> str:
    if value is None:
        return "-"
    if percent:
        return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
