"""What the playground shows, as HTML: every text is escaped, every image a data URL, nothing is fetched."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

from valign.guard.records import GuardResult, Verdict

ACTIONS = {"allow": "goes through as it is", "rewrite": "is rewritten", "block": "is blocked"}

CSS = """
.va {font-size: 15px; line-height: 1.5; overflow-wrap: anywhere}
.va-verdict {padding: .6em .9em; border-radius: 8px; border-left: 6px solid; margin-bottom: .8em;
  background: var(--block-background-fill)}
.va-allow {border-color: #0f766e} .va-rewrite {border-color: #b45309} .va-block {border-color: #b91c1c}
.va mark {background: #fde68a; color: #1f2937; border-radius: 3px; padding: 0 .15em}
.va del {background: #fecaca; color: #7f1d1d; text-decoration: line-through; border-radius: 3px; padding: 0 .15em}
.va ins {background: #bbf7d0; color: #14532d; text-decoration: none; border-radius: 3px; padding: 0 .15em}
.va-stage {display: grid; grid-template-columns: 7em 4.5em 1fr minmax(8em, 14em); gap: .2em .8em; align-items: center;
  padding: .45em .2em; border-top: 1px solid var(--border-color-primary)}
.va-stage b {font-weight: 600} .va-fire {color: #b91c1c} .va-error {color: #b91c1c; font-weight: 600} .va-pass {color: #0f766e}
.dark .va-fire, .dark .va-error {color: #fca5a5} .dark .va-pass {color: #5eead4}
.va-bar {position: relative; height: 10px; border-radius: 5px; background: var(--border-color-primary)}
.va-bar i {position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: #64748b}
.va-bar i.va-over {background: #dc2626}
.va-bar u {position: absolute; top: -4px; bottom: -4px; width: 2px; background: currentColor}
.va small {opacity: .75; font-size: 12.5px}
.va-images {display: flex; flex-wrap: wrap; gap: 1em}
.va-images figure {margin: 0; flex: 1 1 220px; max-width: 420px}
.va-images img, .va-held {width: 100%; aspect-ratio: 1; border-radius: 8px; image-rendering: pixelated}
.va-held {display: grid; place-items: center; padding: 1.5em; text-align: center; border: 1px dashed var(--border-color-primary)}
@media (max-width: 640px) {.va-stage {grid-template-columns: 1fr auto} .va-what, .va-score {grid-column: 1 / -1}}
"""


def verdict(result: GuardResult, prompt: str) -> str:
    """The action, the prompt with the words that fired, and the rewrite as a difference."""
    decision = result.decision
    why = f" by <b>{escape(decision.stop)}</b>" if decision.stop else ""
    kinds = f" ({escape(', '.join(decision.categories))})" if decision.categories else ""
    lines = [f'<div class="va-verdict va-{result.action}">This prompt <b>{ACTIONS[result.action]}</b>{why}{kinds}.</div>']
    if decision.prompt:  # empty after a block rule: nothing of such a prompt is shown again
        lines.append(f"<p>{marked(prompt, [one.span for one in decision.trace if one.fired and one.span])}</p>")
        if result.rewritten and result.prompt is not None:
            lines.append(f"<p>{difference(prompt, result.prompt)}</p>")
    lines += [
        f"<small>{escape(one.source)} ({escape(one.role)}): {escape(one.reason or 'accepted')}</small><br>"
        for one in result.attempts
    ]
    return f'<div class="va">{"".join(lines)}</div>'


def stages(trace: Sequence[Verdict]) -> str:
    """A row per stage: what it said, about what, and its score against its threshold."""
    return f'<div class="va">{"".join(map(_stage, trace))}</div>'


def _stage(one: Verdict) -> str:
    about = " / ".join(part for part in (one.category, one.concept, one.rule) if part) if one.fired else ""
    what = " ".join(part for part in (f"<b>{escape(about)}</b>" if about else "", escape(one.message)) if part)
    return (
        f'<div class="va-stage"><b>{escape(one.stage)}</b><span class="va-{one.outcome}">{one.outcome}</span>'
        f'<span class="va-what">{what} <small>{one.milliseconds:.1f} ms</small></span>'
        f'<span class="va-score">{_bar(one.score, one.threshold)}</span></div>'
    )


def _bar(score: float | None, threshold: float | None) -> str:
    if score is None:
        return ""
    width = f"{100 * min(max(score, 0.0), 1.0):.1f}%"
    over = ' class="va-over"' if threshold is not None and score >= threshold else ""
    tick = f'<u style="left:{100 * min(max(threshold, 0.0), 1.0):.1f}%"></u>' if threshold is not None else ""
    limit = f" of {threshold:.3f}" if threshold is not None else ""
    return f'<div class="va-bar"><i{over} style="width:{width}"></i>{tick}</div><small>{score:.3f}{limit}</small>'


def marked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with the given places marked; places may overlap."""
    inside = [any(start <= i < end for start, end in spans) for i in range(len(text))]
    out, start = [], 0
    for i in range(1, len(text) + 1):
        if i == len(text) or inside[i] != inside[start]:
            part = escape(text[start:i])
            out.append(f"<mark>{part}</mark>" if inside[start] else part)
            start = i
    return "".join(out)


def difference(old: str, new: str) -> str:
    """Word by word: taken out, put in, kept."""
    before, after = re.findall(r"\s+|\S+", old), re.findall(r"\s+|\S+", new)
    out = []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        gone, come = escape("".join(before[i:j])), escape("".join(after[k:m]))
        out.append(gone if kind == "equal" else (f"<del>{gone}</del>" if gone else "") + (f"<ins>{come}</ins>" if come else ""))
    return "".join(out)


def images(parts: Sequence[tuple[str, str | None, str]]) -> str:
    """``(title, data URL or None, remark)``; without an image the remark stands in its place."""
    figures = []
    for title, url, remark in parts:
        shown = f'<img src="{escape(url)}" alt="{escape(title)}">' if url else f'<div class="va-held">{escape(remark)}</div>'
        caption = f"<b>{escape(title)}</b> <small>{escape(remark if url else '')}</small>"
        figures.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="va va-images">{"".join(figures)}</div>'


def mistake(message: str) -> str:
    return f'<div class="va"><div class="va-verdict va-block">{escape(message)}</div></div>'
