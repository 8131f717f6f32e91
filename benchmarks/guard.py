"""What does the guard cost per prompt, stage by stage and as a whole, beside a plain regular expression over the same words?

    python benchmarks/guard.py [--prompts FILE.jsonl] [--count 256] [--rounds 5]

Prints one table: p50, p95, p99 in milliseconds for single prompts, prompts per second in batches of 64. Without --prompts, captions
are made from word lists; half of the made ones hold a listed term, so that both ways through the stages are taken.
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from valign.guard import Guard
from valign.guard.learned import SHIPPED
from valign.policy import Policy, load_policy

PLACES = ["in a garden", "on a quiet beach", "at the harbour", "under a bridge", "in an old library", "on a mountain path"]
THINGS = ["a fisherman", "two dogs", "a red vase", "an astronaut", "a market stall", "a couple dancing", "a stone tower"]
STYLES = ["oil painting", "soft morning light", "35 mm photograph", "highly detailed", "flat colours", "wide shot"]


def made_prompts(policy: Policy, count: int, *, seed: int = 0) -> list[str]:
    """Captions of ordinary length; every second one holds a term of the policy."""
    random = Random(seed)
    terms = [term for category in policy.categories for concept in category.concepts for term in concept.terms]
    return [
        f"{random.choice(THINGS)} {f'and {random.choice(terms)} ' if i % 2 else ''}{random.choice(PLACES)}, {random.choice(STYLES)}"
        for i in range(count)
    ]


def measure(
    one: Callable[[str], object], many: Callable[[list[str]], object] | None, prompts: Sequence[str], rounds: int
) -> list[float]:
    """p50, p95, p99 in ms for single prompts, and prompts per second in batches of 64 (the median of the rounds)."""
    for prompt in prompts[:8]:
        one(prompt)
    singles = []
    for prompt in prompts:
        start = time.perf_counter()
        one(prompt)
        singles.append((time.perf_counter() - start) * 1000)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for first in range(0, len(prompts), 64):
            batch = list(prompts[first : first + 64])
            if many is not None:
                many(batch)
            else:
                for prompt in batch:
                    one(prompt)
        rates.append(len(prompts) / (time.perf_counter() - start))
    return [*np.percentile(singles, [50, 95, 99]).tolist(), float(np.median(rates))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="jsonl file with a field `prompt`")
    parser.add_argument("--count", type=int, default=256, help="prompts measured")
    parser.add_argument("--rounds", type=int, default=5, help="passes over the batches")
    options = parser.parse_args()
    policy = load_policy("default")
    stages = [name for name in ("lexical", "semantic", "learned", "values") if name != "learned" or SHIPPED.exists()]
    every = policy.model_copy(update={"guard": policy.guard.model_copy(update={"stages": stages})})
    if options.prompts:
        prompts = [json.loads(line)["prompt"] for line in options.prompts.read_text(encoding="utf-8").splitlines()][: options.count]
    else:
        prompts = made_prompts(policy, options.count)
    parts = Guard.from_policy(every)
    whole = Guard.from_policy(policy) if SHIPPED.exists() else parts
    words = {term for category in policy.categories for concept in category.concepts for term in concept.terms}
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(words)))})\b", re.IGNORECASE)
    rows = {"regular expression": measure(pattern.search, None, prompts, options.rounds)}
    for stage in parts.stages:
        rows[stage.name] = measure(stage.check, stage.check_many, prompts, options.rounds)
    rows["whole guard, check"] = measure(whole.check, whole.check_many, prompts, options.rounds)
    rows["whole guard, rewrite"] = measure(whole.guard, None, prompts[:64], 1)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {len(prompts)} prompts")
    print(f"{'':24}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'prompts/s':>12}")
    for name, (p50, p95, p99, rate) in rows.items():
        print(f"{name:24}{p50:10.3f}{p95:10.3f}{p99:10.3f}{rate:12.0f}")


if __name__ == "__main__":
    main()
