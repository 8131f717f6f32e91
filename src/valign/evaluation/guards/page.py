"""The guard's report on disk: numbers, tables, ROC and reliability curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from valign.evaluation.guards.rates import Scored, summary
from valign.evaluation.guards.usefulness import SHOWN, diff, ranked, usefulness
from valign.evaluation.guards.valor import valor_metrics
from valign.files import atomic_path, write_json, write_text


def write_guard_report(scored: Sequence[Scored], folder: Path, *, show_prompts: bool = False) -> Mapping[str, Any]:
    """Write results.json, report.md and roc.png; returns what is in results.json."""
    found = {**summary(scored, show_prompts=show_prompts), "valor": valor_metrics(scored), "rewrites": usefulness(scored)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", found)
    write_text(folder / "report.md", page(found))
    if show_prompts and (order := ranked(scored)):
        write_text(folder / "rewrites.md", diff_page(order))
    with atomic_path(folder / "roc.png") as temporary:
        _curves(scored, found).savefig(temporary, format="png", dpi=120)
    return found


def page(found: Mapping[str, Any]) -> str:
    """The report as Markdown. Brackets are 95 % intervals."""
    lines = [
        "# The guard on labelled prompts",
        "",
        "Flagged: harm that was meant, rewritten or blocked. Brackets: 95 % intervals. AUROC against a source's own harmless",
        'prompts, or all of them where it has none. "NAME, certain": only the unsafe prompts that most judges call so.',
        "",
        "| source | unsafe | recall | safe | false alarms | AUROC | against |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["sources"]:
        recall, alarms = (_percent(one[key]) for key in ("recall", "false_alarms"))
        area = one["auroc"]
        shown = f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]" if area else "-"
        lines.append(f"| {one['source']} | {one['unsafe']} | {recall} | {one['safe']} | {alarms} | {shown} | {one['against']} |")
    lines += ["", "| category | prompts | recall | category right |", "|---|---|---|---|"]
    for name, one in found["categories"].items():
        lines.append(f"| {name} | {one['prompts']} | {_percent(one['recall'])} | {_percent(one['named_right'])} |")
    lines += ["", "| decided by | unsafe | safe |", "|---|---|---|"]
    lines += [f"| {name} | {one['unsafe']} | {one['safe']} |" for name, one in found["stages"].items()]
    lines += ["", "Each layer alone, whatever the others say; `intent`: the judge of intent, where a stage had fired.", ""]
    lines += ["| layer | recall | false alarms | accuracy |", "|---|---|---|---|"]
    for name, one in found["layers"].items():
        lines.append(f"| {name} | {_percent(one['recall'])} | {_percent(one['false_alarms'])} | {_percent(one['accuracy'])} |")
    lines += _valor(found["valor"])
    lines += _rewrites(found.get("rewrites", {}))
    for title, key in (("Worst false alarms", "false_alarms"), ("Worst misses", "misses")):
        lines += ["", f"## {title}", ""]
        lines += [
            f"- `{one['id']}` {one['score']:.3f} {one['stop']} {one.get('prompt', '')}".rstrip() for one in found["worst"][key]
        ]
    return "\n".join([*lines, "", "![curves](roc.png)", ""])


def _valor(found: Mapping[str, Any]) -> list[str]:
    """VALOR's metrics as tables."""
    columns = ("accuracy", "precision", "recall", "f1", "fpr", "fnr")
    lines = [
        "",
        "VALOR's metrics of the decision, and of the judge of intent where it was asked (`intent`). Precision and F1 depend",
    ]
    lines += [
        "on the share of unsafe prompts in the set.",
        "",
        f"| source | prompts | {' | '.join(columns)} |",
        f"|---|{'---|' * 7}",
    ]
    for name, one in (found["decision"] | {"intent": found["intention"]}).items():
        cells = ["-" if one[key] is None else f"{one[key]:.1%}" for key in columns]
        lines.append(f"| {name} | {one['cases']} | {' | '.join(cells)} |")
    made = found["rewriting"]
    if made["prompts"]:
        means = ["-" if made[key] is None else f"{made[key]:.3f}" for key in ("unsafe_removal", "keep_words", "keep_meaning")]
        lines += [
            "",
            "| asked to rewrite | rewritten | with listed terms | unsafe removal | words kept | meaning kept |",
            f"|{'---|' * 6}",
        ]
        lines.append(f"| {made['prompts']} | {_percent(made['rewritten'])} | {made['with_listed_terms']} | {' | '.join(means)} |")
    return lines


def _rewrites(found: Mapping[str, Any]) -> list[str]:
    """What rewrites keep, by source."""
    if not found:
        return []
    shares = (
        ("rewritten", "rewritten"),
        ("template", "template"),
        ("second head agrees", "agreed"),
        ("subject kept", "keep_subject"),
    )
    numbers = (
        ("words kept", "kept"), ("by the pair", "safe_kept"), ("meaning kept", "keep_meaning"), ("to the pair", "safe_meaning"),
        ("prompt to pair", "prompt_to_safe"), ("perplexity", "perplexity"), ("of the pair", "safe_perplexity"),
        ("guard calls", "checks"), ("at most", "most_checks"), ("ms", "milliseconds"),
    )  # fmt: skip
    lines = [
        "",
        "## What rewrites keep",
        "",
        "Medians over the rewrites, and shares. Template: a scene of the policy in place of the prompt. Words kept: share of the",
        "prompt's words. Meaning: cosine of sentence vectors. Pair: the set's own safe prompt of the same scene.",
        "",
        f"| source | prompts | {' | '.join(title for title, _ in (*shares, *numbers))} |",
        f"|---|{'---|' * (1 + len(shares) + len(numbers))}",
    ]
    for name, one in found.items():
        cells = [_percent(one[key]) for _, key in shares]
        cells += ["-" if one[key] is None else f"{one[key]:.3g}" for _, key in numbers]
        lines.append(f"| {name} | {one['prompts']} | {' | '.join(cells)} |")
    lines += ["", "| source | rewritten by |", "|---|---|"]
    return [
        *lines,
        *(f"| {name} | {', '.join(f'{by} {n}' for by, n in one['by'].items()) or '-'} |" for name, one in found.items()),
    ]


def diff_page(order: Sequence[Scored]) -> str:
    """The best and the worst rewrites as Markdown, what is gone struck out and what is new in bold."""
    lines = ["# Rewrites", "", "By the meaning and the words that they keep."]
    parts = (("Best", order[:SHOWN]), ("Worst", order[max(SHOWN, len(order) - SHOWN) :]))
    for title, some in parts:
        lines += ["", f"## {title}", ""]
        for one in some:
            assert one.rewrite is not None
            lines.append(f"- `{one.row.id}` {one.rewrite.source}: {diff(one.row.prompt, one.rewrite.text)}")
    return "\n".join([*lines, ""])


def _percent(value: Mapping[str, float] | None) -> str:
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]" if value else "-"


def roc(scored: Sequence[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """False-alarm rate and recall at every threshold, both rising from 0 to 1."""
    label = np.array([one.row.label for one in scored], dtype=bool)
    order = np.argsort(-np.array([one.score for one in scored]), kind="stable")
    hits, alarms = np.cumsum(label[order]), np.cumsum(~label[order])
    return np.r_[0, alarms / max(alarms[-1], 1)], np.r_[0, hits / max(hits[-1], 1)]


def _curves(scored: Sequence[Scored], found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    alarms, recall = roc(scored)
    left.plot(alarms, recall)
    left.set(xlabel="false alarms", ylabel="recall", title="ROC, all sources", xlim=(0, 1), ylim=(0, 1))
    bins = found["reliability"]
    right.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    right.plot([one["score"] for one in bins], [one["unsafe"] for one in bins], marker="o")
    right.set(xlabel="score", ylabel="share unsafe", title="Reliability", xlim=(0, 1), ylim=(0, 1))
    return figure
