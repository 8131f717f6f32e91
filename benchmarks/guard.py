"""What does the guard cost per prompt and what does it find, stage by stage and whole, beside word filters on the same prompts?

    python benchmarks/guard.py [--data PATH ...] [--count 256] [--rounds 5] [--threads 2] [--busy N] [--json FILE]

Prints one table, in which the whole guard runs with one thread of torch, as it does by itself, and with ``--threads``; ``--busy``
keeps N processes at work beside it, as on a host with other services. For single prompts: p50, p95, p99 in milliseconds. In
batches of 64: prompts per second (median of the rounds), and that as a multiple of the whole guard's, which says more on a busy
machine. ``cpu ms`` is processor time per prompt in batches. Then recall on unsafe and false alarms on safe prompts. At the end:
what the learned stage's 8 bits change. ``--data`` takes files or folders of labelled prompts (as in `valign guard evaluate`);
without it captions are made from word lists, every second one with a listed term, so its recall shows nothing.

The word filters are measured if they are installed: ``pip install alt-profanity-check better-profanity``.
"""

import argparse
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from valign.data.prompts.labelled import capped, read_rows, without_repeats
from valign.data.prompts.pairs import LabelledPrompt
from valign.evaluation.guards.rates import auroc
from valign.files import write_json
from valign.guard import Guard
from valign.guard.head.learned import LearnedStage
from valign.models.encoders.int8 import has_int8
from valign.models.encoders.minilm import MiniLM
from valign.policy import Policy, load_policy
from valign.text import clean

BATCH = 64
PLACES = ["in a garden", "on a quiet beach", "at the harbour", "under a bridge", "in an old library", "on a mountain path"]
THINGS = ["a fisherman", "two dogs", "a red vase", "an astronaut", "a market stall", "a couple dancing", "a stone tower"]
STYLES = ["oil painting", "soft morning light", "35 mm photograph", "highly detailed", "flat colours", "wide shot"]
Filter = Callable[[list[str]], Sequence[bool]]  # prompts -> which are flagged


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    p50: float
    p95: float
    p99: float  # ms
    rate: float  # prompts per second
    cpu: float  # ms per prompt
    recall: float
    false_alarms: float  # shares; NaN without such prompts


def made_rows(policy: Policy, count: int, *, seed: int = 0) -> list[LabelledPrompt]:
    """Captions of ordinary length; every second one holds a term of the policy."""
    random = Random(seed)
    terms = [term for category in policy.categories for concept in category.concepts for term in concept.terms]
    texts = [
        f"{random.choice(THINGS)} {f'and {random.choice(terms)} ' if i % 2 else ''}{random.choice(PLACES)}, {random.choice(STYLES)}"
        for i in range(count)
    ]
    return [LabelledPrompt(str(i), text, i % 2, (), "made", str(i)) for i, text in enumerate(texts)]


def read(paths: Sequence[Path], policy: Policy, count: int) -> list[LabelledPrompt]:
    """Rows of every source and label alike, about ``count`` in all, in an order that mixes them."""
    rows = without_repeats(read_rows(paths, policy))
    rows = capped(rows, -(-count // len({(row.source, row.label) for row in rows})), seed=0)
    Random(0).shuffle(rows)
    return rows


def measure(flags: Filter, rows: Sequence[LabelledPrompt], rounds: int) -> Measured:
    prompts = [row.prompt for row in rows]
    flags(prompts[:BATCH])
    singles = []
    for prompt in prompts:
        start = time.perf_counter()
        flags([prompt])
        singles.append((time.perf_counter() - start) * 1000)
    walls, cpus = [], []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        found = [flag for first in range(0, len(prompts), BATCH) for flag in flags(prompts[first : first + BATCH])]
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - cpu)
    hits, label = np.array(found, dtype=bool), np.array([row.label for row in rows], dtype=bool)
    shares = [float(hits[own].mean()) if own.any() else float("nan") for own in (label, ~label)]
    p50, p95, p99 = np.percentile(singles, [50, 95, 99]).tolist()
    return Measured(p50, p95, p99, len(rows) / float(np.median(walls)), min(cpus) * 1000 / len(rows), *shares)


def word_filters(policy: Policy) -> dict[str, Filter]:
    """The plain regular expression over the policy's words, and those packages that are installed."""
    words = {term for category in policy.categories for concept in category.concepts for term in concept.terms}
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(words)))})\b", re.IGNORECASE)
    found: dict[str, Filter] = {"regular expression": lambda prompts: [pattern.search(prompt) is not None for prompt in prompts]}
    try:
        from better_profanity import profanity

        found["better-profanity"] = lambda prompts: [profanity.contains_profanity(prompt) for prompt in prompts]
    except ImportError:
        pass
    try:
        from profanity_check import predict

        found["alt-profanity-check"] = lambda prompts: [bool(one) for one in predict(prompts)]
    except ImportError:
        pass
    return found


def guards(policy: Policy, threads: int) -> dict[str, Filter]:
    """Every stage alone, then the whole embedded guard: its decision, with one thread and with more, and with the rewrite."""
    every = policy.model_copy(
        update={"guard": policy.guard.model_copy(update={"stages": ["lexical", "semantic", "learned", "values"]})}
    )
    found: dict[str, Filter] = {}
    for stage in Guard.from_policy(every).stages:
        found[stage.name] = lambda prompts, stage=stage: [verdict.fired for verdict in stage.check_many(prompts)]
    whole = Guard.from_policy(policy)

    def rewrite(prompts: list[str]) -> list[bool]:
        return [whole.finish(one, prompt).decision.flagged for one, prompt in zip(whole.check_many(prompts), prompts)]

    found["whole guard, check"] = lambda prompts: [decision.flagged for decision in whole.check_many(prompts)]
    found["whole guard, rewrite"] = rewrite
    if threads != whole.threads:
        several = Guard.from_policy(policy, threads=threads)
        found[f"whole, {threads} threads"] = lambda prompts: [decision.flagged for decision in several.check_many(prompts)]
    return found


def compare_bits(policy: Policy, rows: Sequence[LabelledPrompt]) -> str:
    """AUROC and decisions of the learned stage in 8 bits, as it runs where the processor has them, and in float32."""
    if not has_int8():
        return "this processor has no products in 8 bits: the learned stage runs in 32"
    label, texts = np.array([row.label for row in rows], dtype=bool), [clean(row.prompt) for row in rows]
    stage = LearnedStage.from_policy(policy, MiniLM())
    fired, areas = [], []
    for quick in (True, False):
        scores = stage.head.score(stage.encoder, texts, quick=quick)
        areas.append(f"{auroc(scores[label, 0], scores[~label, 0]).value:.4f}" if label.any() and not label.all() else "-")
        fired.append(stage.fires(scores))
    differ = float(np.mean(fired[0] != fired[1]))
    return f"learned stage in 8 bits and in 32: AUROC {areas[0]} and {areas[1]}, {differ:.2%} of the decisions differ"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that compute without end while the body runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="labelled prompts: files, or folders of files")
    parser.add_argument("--count", type=int, default=256, help="prompts measured, about")
    parser.add_argument("--rounds", type=int, default=5, help="passes over the batches")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for single stages and the guard with several")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it, without end")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = load_policy("default")
    rows = read(options.data, policy, options.count) if options.data else made_rows(policy, options.count)
    filters = word_filters(policy) | guards(policy, options.threads)
    with busy(options.busy):
        found = {name: measure(flags, rows, options.rounds) for name, flags in filters.items()}
    unsafe = sum(row.label for row in rows)
    print(f"{platform.machine()}, {options.threads} threads, {options.busy} other processes, torch {torch.__version__}")
    print(f"{unsafe} unsafe and {len(rows) - unsafe} safe prompts")
    heads = f"{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'prompts/s':>11}{'x guard':>9}{'cpu ms':>9}{'recall':>9}{'false alarms':>14}"
    print(f"{'':22}{heads}")
    guard = found["whole guard, check"].rate
    for name, one in found.items():
        print(
            f"{name:22}{one.p50:9.3f}{one.p95:9.3f}{one.p99:9.3f}{one.rate:11.0f}{one.rate / guard:9.2f}{one.cpu:9.3f}"
            f"{one.recall:9.1%}{one.false_alarms:14.1%}"
        )
    print(compare_bits(policy, rows))
    if options.json:
        write_json(options.json, {name: asdict(one) for name, one in found.items()})


if __name__ == "__main__":
    main()
