"""The judge of rewrites: logistic regression on hashed n-grams. It shares neither encoder nor training with the guard's head, so a
text that only slips through the head does not slip through it by the same door."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from valign.data.prompts.pairs import LabelledPrompt
from valign.models.heads.ngrams import ngram_ids
from valign.text import clean
from valign.training.tasks.guard_head.fit import source_weights


def fit_judge(rows: Sequence[LabelledPrompt], buckets: int, *, strength: float = 3.0) -> dict[str, Tensor]:
    """``judge.weight`` and ``judge.bias`` of `valign.models.heads.edit_model.judge_logits`.

    Args: strength: Inverse of the quadratic penalty; both labels and, by the root of their size, sources weigh alike.
    """
    grams = [ngram_ids(clean(row.prompt), buckets) for row in rows]
    values = np.concatenate([np.full(len(one), len(one) ** -0.5) for one in grams])
    starts = np.cumsum([0, *map(len, grams)])
    inputs = csr_matrix((values, np.concatenate(grams), starts), shape=(len(rows), buckets))
    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(inputs, [row.label for row in rows], sample_weight=source_weights(rows).numpy())
    return {
        "judge.weight": torch.from_numpy(model.coef_[0]).float(),
        "judge.bias": torch.tensor(float(model.intercept_[0])),
    }
