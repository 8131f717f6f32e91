"""What does a search for guidelines cost in a large library, beside the encoder's forward pass?

    python benchmarks/guidelines.py [--guidelines 10000] [--requests 200]

Texts are drawn from the words of the bundled library, vectors at random: what is timed is the product and the filter of texts that
are alike, first for texts that were never compared before. Median and 95th percentile, in milliseconds of wall and processor time.
"""

import argparse
import random
import time

import numpy as np

from valign.guard.guidelines import GuidelineRetriever
from valign.models.encoders.minilm import WIDTH
from valign.policy import Guideline, load_policy


class RandomVectors:
    """In the place of a fitted bi-encoder."""

    question_matrix = context_matrix = np.zeros((1, 1))

    def contexts(self, encoder, texts):
        return unit_rows(0, len(texts))


def unit_rows(seed: int, count: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(guidelines: int, requests: int) -> None:
    draw = random.Random(0)
    words = [word for one in load_policy("default").guidelines for word in one.text.split()]
    library = tuple(
        Guideline(id=f"g{number}", text=" ".join(draw.choices(words, k=draw.randint(10, 22))), requests=["any"])
        for number in range(guidelines)
    )
    retriever = GuidelineRetriever(library, RandomVectors(), lambda: None)
    retriever.rows  # noqa: B018 - computed once, before the clock starts
    for name in ("new", "seen"):
        spent = []
        for question in unit_rows(1, requests):
            wall, own = time.perf_counter(), time.process_time()
            retriever.select(question)
            spent.append((time.perf_counter() - wall, time.process_time() - own))
        median, late = 1e3 * np.median(spent, axis=0), 1e3 * np.percentile(spent, 95, axis=0)
        print(f"{name}: wall {median[0]:.2f} (95 %: {late[0]:.2f}), processor {median[1]:.2f} (95 %: {late[1]:.2f}) ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--guidelines", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    measure(arguments.guidelines, arguments.requests)
