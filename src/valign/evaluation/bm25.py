"""Okapi BM25, the baseline of every retriever: words shared, rare ones weighing more (Robertson and Zaragoza, 2009)."""

from collections import Counter
from collections.abc import Sequence
from math import log

import numpy as np
from jaxtyping import Float

from valign.text import fold


def bm25_scores(query: str, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> Float[np.ndarray, " text"]:
    """Score of every text for the query: ``sum_w idf(w) f (k1 + 1) / (f + k1 (1 - b + b len / mean))`` over the query's words.

    ``idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5))``, which is never negative; words are compared after folding.
    """
    documents = [fold(text).split() for text in texts]
    mean = sum(map(len, documents)) / max(1, len(documents))
    counts = [Counter(words) for words in documents]
    scores = np.zeros(len(texts))
    for word in dict.fromkeys(fold(query).split()):
        holding = sum(word in count for count in counts)
        idf = log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for number, (words, count) in enumerate(zip(documents, counts)):
            f = count[word]
            scores[number] += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(words) / max(mean, 1e-9)))
    return scores
