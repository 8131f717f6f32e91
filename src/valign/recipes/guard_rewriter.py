"""Fit the editing model of the guard's rewriter on paired prompts, its judge beside it, and write both with their card."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from valign.checks import UserError
from valign.data.prompts.labelled import policy_rows, without_repeats
from valign.data.prompts.pairs import LabelledPrompt
from valign.files import hash_value, read_json, write_json, write_text
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.edit_model import EditModel, EditSettings, judge_logits, load_edit_model, save_edit_model
from valign.models.heads.prompt_head import ANY, Head
from valign.policy import Policy
from valign.recipes.guard_head import TEST_FOLD
from valign.runs import Run
from valign.text import clean, fold
from valign.training.tasks.guard_head.fit import hidden_words
from valign.training.tasks.rewriter.fit import RewriterConfig, fit_edits, vocabulary_of
from valign.training.tasks.rewriter.judge import fit_judge
from valign.training.tasks.rewriter.labels import EditExample, examples

MARGIN = 0.25  # share of the guard's threshold below which a shortened prompt counts as harmless
LIMIT_FOLD = 1  # a tenth of the groups that the judge does not learn from: its limit is set there
JUDGED = 0.10  # share of the safe prompts of pairs that the judge may take for harmful
FILE = "rewriter.safetensors"


@dataclass(frozen=True)
class RewriterReport:
    """The result of `fit_rewriter`."""

    sha256: str
    size: int  # bytes
    examples: int
    words: int  # of the vocabulary


def fit_rewriter(
    rows: Sequence[LabelledPrompt],
    policy: Policy,
    out: Path,
    *,
    config: RewriterConfig,
    encoder: MiniLM,
    head: Head,
    leave_out: Sequence[str] = (),
) -> RewriterReport:
    """The whole of ``valign guard fit-rewriter``: rewriter.safetensors, CARD.md and run.json in ``out``. It resumes.

    A tenth of the groups of every source, and the sources of ``leave_out`` as a whole, are never looked at.

    Args: head: The guard's; says when a shortened prompt is harmless.
    Raises: UserError for an unknown source, or without paired prompts.
    """
    known = sorted({row.source for row in rows})
    if unknown := sorted(set(leave_out) - set(known)):
        raise UserError(f"--leave-out must name sources of the data, got {', '.join(unknown)}. Known: {', '.join(known)}.")
    rows = [row for row in without_repeats(rows) if row.source not in leave_out and row.fold != TEST_FOLD]
    recipe = {"config": asdict(config), "policy": policy.fingerprint(), "leave_out": sorted(leave_out)}
    inputs = {"rows": hash_value([asdict(row) for row in rows]), "head": head.sha256, "encoder": encoder.sha256}
    run = Run.open(out, step="guard rewriter", recipe=recipe, inputs=inputs, seed=config.seed)
    if run.done:
        return RewriterReport(**run.results)
    rows += policy_rows(policy)
    harmless = [row.prompt for row in rows if row.label == 0]
    vocabulary = allowed_words(vocabulary_of(harmless, encoder), policy, head, encoder)
    found = _examples(rows, head, encoder, config, out / "examples.json")
    judge, limit = judge_of(rows, config)
    weights = fit_edits(found, harmless, policy.category_ids(), vocabulary, encoder, config, out=out)
    settings = EditSettings(
        categories=policy.category_ids(),
        vocabulary=vocabulary,
        encoder_sha256=encoder.sha256,
        tuned_layers=config.tuned_layers,
        judge_buckets=config.judge_buckets,
        judge_limit=limit,
        notes={
            "config": asdict(config),
            "policy": policy.fingerprint(),
            "head": head.sha256,
            "left_out": sorted(leave_out),
            "examples": len(found),
            "trained_on": {name: sum(row.source == name for row in rows) for name in sorted({row.source for row in rows})},
        },
    )
    vectors = {"words.vectors": torch.from_numpy(encoder.encode(vocabulary))}
    sha = save_edit_model(EditModel(settings, weights | judge | vectors), out / FILE)
    write_text(out / "CARD.md", card(load_edit_model(out / FILE)))
    report = RewriterReport(sha, (out / FILE).stat().st_size, len(found), len(vocabulary))
    run.finish(**asdict(report))
    return report


def _examples(rows: Sequence[LabelledPrompt], head: Head, encoder: MiniLM, config: RewriterConfig, path: Path) -> list[EditExample]:
    """`examples` by the head, from the file if it is there."""
    if path.exists():
        lists = ("change", "open", "gone", "instead")
        return [EditExample(**one | {name: tuple(one[name]) for name in lists}) for one in read_json(path)]
    limit = MARGIN * head.settings.thresholds["balanced"][ANY]

    def risk(texts: Sequence[str]) -> Float[np.ndarray, " text"]:
        return head.score(encoder, [clean(text) for text in texts])[:, 0] - limit

    found = examples(rows, risk, most=config.pairs, seed=config.seed)
    write_json(path, [asdict(one) for one in found])
    return found


def judge_of(rows: Sequence[LabelledPrompt], config: RewriterConfig) -> tuple[dict[str, Any], float]:
    """The judge's tensors, and the probability that `JUDGED` of the safe prompts of pairs that it did not learn from exceed."""
    judge = fit_judge([row for row in rows if row.fold != LIMIT_FOLD], config.judge_buckets)
    kept = [clean(row.prompt) for row in rows if row.fold == LIMIT_FOLD and row.label == 0 and row.pair]
    if not kept:
        raise UserError(
            "--data must hold paired prompts (rows that share a pair_id) in a tenth of the groups, got none. Add pairs."
        )
    scores = judge_logits(judge["judge.weight"], judge["judge.bias"], kept).sigmoid()
    return judge, float(scores.quantile(1 - JUDGED))


def allowed_words(words: Sequence[str], policy: Policy, head: Head, encoder: MiniLM) -> tuple[str, ...]:
    """Those that may be filled in: no words for minors, none of the policy's terms, none suspicious to the head by themselves."""
    texts = [text for rule in policy.always_block for terms in rule.every for text in terms]
    for category in policy.categories:
        texts += [*category.terms, *(term for concept in category.concepts for term in concept.terms)]
    banned = {word for text in (*texts, *hidden_words(policy)) for word in fold(text).split()}
    left = [word for word in words if word not in banned]
    scores = head.score(encoder, [f"a photo of {word}" for word in left])[:, 0]
    limit = MARGIN * head.settings.thresholds["balanced"][ANY]
    return tuple(word for word, score in zip(left, scores) if score < limit)


def card(model: EditModel) -> str:
    """The model card: what the model is, its training data, its limits."""
    notes, settings = model.settings.notes, model.settings
    lines = [
        "# Rewriter of the guard",
        "",
        "Says which words of a prompt must change, and fills in harmless ones. Lower layers: those of all-MiniLM-L6-v2",
        f"(Apache-2.0); {settings.tuned_layers} upper layers are its own. {len(settings.vocabulary)} words may be filled in.",
        f"A logistic regression on {settings.judge_buckets} hashed n-grams, which took no part in the rest, judges its rewrites:",
        f"one that it holds harmful with a probability of {settings.judge_limit:.3f} or more is not used.",
        f"SHA-256 `{model.sha256}`. Licence: Apache-2.0.",
        "",
        "## Trained on",
        "",
        "| source | rows |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in notes["trained_on"].items()),
        "",
        f"{notes['examples']} paired prompts taught which words must change, the harmless rows what fits.",
        "A tenth of the groups of every source was never looked at.",
        f"Left out altogether: {', '.join(notes['left_out']) or 'nothing'}.",
        f"Settings: `{notes['config']}`.",
        "",
        "No text of these sets is in the file; half-precision weights and single words only. English only.",
        "",
    ]
    return "\n".join(lines)
