"""The guard's head beside simple rivals on the same rows, each source left out in turn: recall on harm that none was trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from valign.checks import UserError
from valign.data.prompts.labelled import without_repeats
from valign.data.prompts.pairs import LabelledPrompt
from valign.evaluation.guards.page import roc
from valign.evaluation.guards.rates import ALL, Scored, source_rates
from valign.files import atomic_path, hash_value, read_json, write_json, write_text
from valign.guard.rules.semantic import References, references
from valign.models.encoders.minilm import MiniLM
from valign.policy import Policy
from valign.progress import track
from valign.recipes.guard_head import CHUNK, enriched, pooled, split
from valign.runs import Run
from valign.text import clean
from valign.training.tasks.guard_head.calibration import calibrate
from valign.training.tasks.guard_head.fit import FitConfig, fit_head

Texts = Sequence[str]
Scorer = Callable[[Texts], Float[np.ndarray, " text"]]  # higher means more harmful
NOTHING = "nothing"  # name of the split that leaves no source out


@dataclass(frozen=True)
class Workbench:
    """What rivals may use to be fitted on rows; texts are cleaned."""

    policy: Policy
    encoder: MiniLM
    config: FitConfig
    _known: dict[str, Float[np.ndarray, " dim"]] = field(default_factory=dict, repr=False)

    def vectors(self, texts: Texts) -> Float[np.ndarray, "text dim"]:
        """The frozen encoder's, each text encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for first in track(range(0, len(new), CHUNK), "encode prompts"):
            chunk = new[first : first + CHUNK]
            self._known.update(zip(chunk, self.encoder.encode(chunk)))
        return np.stack([self._known[text] for text in texts])


def fit_tfidf(bench: Workbench, rows: Sequence[LabelledPrompt]) -> Scorer:
    """Words and pairs of words, weighted, and a logistic regression."""
    bag = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    model.fit(bag.fit_transform(_texts(rows)), _labels(rows))
    return lambda texts: model.predict_proba(bag.transform(texts))[:, 1]


def fit_linear(bench: Workbench, rows: Sequence[LabelledPrompt]) -> Scorer:
    """A logistic regression on the frozen encoder's vectors."""
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    model.fit(bench.vectors(_texts(rows)), _labels(rows))
    return lambda texts: model.predict_proba(bench.vectors(texts))[:, 1]


def fit_mlp(bench: Workbench, rows: Sequence[LabelledPrompt]) -> Scorer:
    """256 hidden units on the frozen encoder's vectors."""
    model = MLPClassifier((256,), early_stopping=True, max_iter=60, random_state=bench.config.seed)
    model.fit(bench.vectors(_texts(rows)), _labels(rows))
    return lambda texts: model.predict_proba(bench.vectors(texts))[:, 1]


def fit_references(bench: Workbench, rows: Sequence[LabelledPrompt]) -> Scorer:
    """The paper's: the highest cosine to a concept of the policy. Learns nothing."""
    known = References(bench.encoder, references(bench.policy))
    return lambda texts: known.cosines(texts).max(axis=1)


def fit_ours(bench: Workbench, rows: Sequence[LabelledPrompt]) -> Scorer:
    """The head that ``valign guard fit`` trains; its column "any"."""
    head = fit_head(rows, bench.policy, bench.encoder, bench.config)
    return lambda texts: head.score(bench.encoder, texts)[:, 0]


RIVALS: Mapping[str, Callable[[Workbench, Sequence[LabelledPrompt]], Scorer]] = {
    "references": fit_references,
    "tfidf": fit_tfidf,
    "linear": fit_linear,
    "mlp": fit_mlp,
    "head": fit_ours,
}


def bench_head(
    rows: Sequence[LabelledPrompt],
    policy: Policy,
    out: Path,
    *,
    config: FitConfig,
    encoder: MiniLM,
    leave_out: Sequence[str] = (),
    target_fpr: float = 0.01,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run or resume the comparison in ``out``; returns what ``results.json`` holds.

    For each source left out and for none: all rivals are fitted on the same rows, a tenth of the groups of the other sources is
    kept for testing, and each rival's threshold is set on the harmless ones among those.
    Args:
        leave_out: Sources, one at a time; none given: every one with unsafe rows.
        target_fpr: Share of harmless prompts that may be flagged, on every source large enough to show it.
        limit: Rows per source and label that are trained on, at most.
    Raises: UserError for an unknown source, or one without which nothing is left to learn from.
    """
    rows = without_repeats(rows)
    names = list(leave_out) or sorted({row.source for row in rows if row.label})
    splits = {name: split(rows, config, leave_out=[name], limit=limit) for name in names}
    splits[NOTHING] = split(rows, config, limit=limit)
    for name, (trained, _) in splits.items():
        if len({row.label for row in trained}) < 2:
            raise UserError(f"--leave-out {name} must leave safe and unsafe rows to train on, got one kind. Add data.")
    data = hash_value([(row.id, row.prompt, row.label) for row in rows])
    recipe = {"config": asdict(config), "target_fpr": target_fpr, "limit": limit}
    bench = Workbench(policy, encoder, config)
    found: dict[str, dict[str, list[Scored]]] = {}
    for name, (trained, tested) in track(splits.items(), "leave sources out", total=len(splits)):
        run = Run.open(out / name, step="bench-head", recipe=recipe, inputs={"data": data, "policy": policy.fingerprint()})
        plain, variants = enriched(trained, policy, config)
        trained = plain + variants
        found[name] = {
            rival: _judged(out / name / f"{rival}.json", rival, bench, trained, tested, name, target_fpr) for rival in RIVALS
        }
        run.finish(trained_on=len(trained), tested_on=len(tested))
    results = {
        "splits": {name: {rival: _rates(scored, name) for rival, scored in each.items()} for name, each in found.items()},
        "seen": _by_source(found[NOTHING]),
        "settings": recipe,
    }
    write_json(out / "results.json", results)
    write_text(out / "report.md", page(results))
    with atomic_path(out / "roc.png") as temporary:
        _curves(found).savefig(temporary, format="png", dpi=120)
    return results


def _judged(
    path: Path,
    rival: str,
    bench: Workbench,
    trained: Sequence[LabelledPrompt],
    tested: Sequence[LabelledPrompt],
    left_out: str,
    target_fpr: float,
) -> list[Scored]:
    """Every tested row with the rival's score; read from ``path`` if an earlier call was there."""
    if not path.exists():
        scores = RIVALS[rival](bench, trained)(_texts(tested))
        write_json(path, {"threshold": _threshold(scores, tested, left_out, target_fpr), "scores": np.asarray(scores).tolist()})
    stored = read_json(path)
    return [Scored(row, score >= stored["threshold"], score, "", "") for row, score in zip(tested, stored["scores"], strict=True)]


def _threshold(scores: Float[np.ndarray, " row"], tested: Sequence[LabelledPrompt], left_out: str, target_fpr: float) -> float:
    """Set without the source that is left out; with fewer harmless rows than the rate can show, for the rate that they can."""
    safe: dict[str, list[float]] = {}
    for row, score in zip(tested, scores.tolist()):
        if not row.label and row.source != left_out:
            safe.setdefault(row.source, []).append(score)
    if not safe:
        raise UserError(f"--leave-out {left_out} must leave harmless rows to set thresholds on, got none. Add harmless prompts.")
    columns = {name: np.array(own)[:, None] for name, own in safe.items()}
    rate = max(target_fpr, 1 / sum(map(len, safe.values())))
    groups, rates = pooled(columns, dict.fromkeys(columns, rate))
    return float(calibrate(groups, target_fpr=rates)[0])


def _rates(scored: Sequence[Scored], left_out: str) -> dict[str, Any]:
    """Of the source left out, or of all held-out rows where none is."""
    rates = {one.source: one for one in source_rates(scored)}
    return asdict(rates["all" if left_out == NOTHING else left_out])


def _by_source(found: Mapping[str, Sequence[Scored]]) -> dict[str, dict[str, Any]]:
    """Source -> rival -> rates on its held-out rows, after training on its others."""
    rates: dict[str, dict[str, Any]] = {}
    for rival, scored in found.items():
        for one in source_rates(scored):
            rates.setdefault(one.source, {})[rival] = asdict(one)
    return {name: each for name, each in rates.items() if name not in ALL}


def _texts(rows: Sequence[LabelledPrompt]) -> list[str]:
    return [clean(row.prompt) for row in rows]


def _labels(rows: Sequence[LabelledPrompt]) -> list[int]:
    return [row.label for row in rows]


def page(results: Mapping[str, Any]) -> str:
    """Three tables as Markdown. Brackets are 95 % intervals."""
    rate = results["settings"]["target_fpr"]
    lines = ["# The guard's head beside simple rivals", ""]
    lines += [
        "All are trained on the same rows. First the sources that none saw; `nothing` is a tenth of the groups of all sources",
        "that is never trained on, and below it stand the sources of which that tenth was kept and the rest was seen.",
        f"Thresholds: at most {rate:.1%} of other sources' held-out harmless prompts flagged.",
    ]
    groups = results["splits"] | {f"rest of {name}": each for name, each in results["seen"].items()}
    for title, key, percent in (("AUROC", "auroc", False), ("Recall", "recall", True), ("False alarms", "false_alarms", True)):
        lines += ["", f"## {title}", "", f"| trained without | {' | '.join(RIVALS)} |", f"|---|{'---|' * len(RIVALS)}"]
        for name, each in groups.items():
            if any(each[rival][key] for rival in RIVALS):
                lines.append(f"| {name} | {' | '.join(_cell(each[rival][key], percent=percent) for rival in RIVALS)} |")
    return "\n".join([*lines, "", "![ROC curves](roc.png)", ""])


def _cell(value: Mapping[str, float] | None, *, percent: bool) -> str:
    if value is None:
        return "-"
    form = ".1%" if percent else ".3f"
    return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def _curves(found: Mapping[str, Mapping[str, Sequence[Scored]]]) -> Figure:
    """One ROC image per split: the source left out, against its own harmless prompts or all held-out ones."""
    columns = min(3, len(found))
    lines = ceil(len(found) / columns)
    figure = Figure(figsize=(4 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    for axis, (name, each) in zip(axes, found.items()):
        for rival, scored in each.items():
            axis.plot(*roc(_compared(scored, name)), label=rival, linewidth=1.2)
        axis.set(xlabel="false alarms", ylabel="recall", title=name, xlim=(0, 1), ylim=(0, 1))
    axes[0].legend(loc="lower right", fontsize=8)
    return figure


def _compared(scored: Sequence[Scored], left_out: str) -> list[Scored]:
    """The rows that the split's AUROC is of."""
    own = [one for one in scored if left_out in (NOTHING, one.row.source)]
    if any(not one.row.label for one in own):
        return own
    return own + [one for one in scored if not one.row.label]
