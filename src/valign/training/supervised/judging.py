"""The model's answers to held-out rows, and how good they are."""

from collections.abc import Sequence

import numpy as np
import torch

from valign.data.tasks import SCORES, Row
from valign.models.task_model import TaskModel
from valign.training.supervised.scores import scores


@torch.no_grad()
def judge(model: TaskModel, rows: Sequence[Row], *, batch_size: int) -> dict[str, float]:
    """``loss`` (mean per row, or per token of a language model) and every score of the task's kind; in evaluation mode.

    Rows of like length are read together, so the order of ``rows`` changes nothing but rounding.
    """
    was = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda place: rows[place].size)
    loss, weight, answers = 0.0, 0, np.zeros(len(rows))
    kind = model.target.kind
    graded = SCORES[kind] != ("loss",)
    for first in range(0, len(rows), batch_size):
        places = order[first : first + batch_size]
        batch = model.batch([rows[place] for place in places])
        found = model(batch).float()
        loss, weight = loss + float(model.summed(found, batch)), weight + batch.weight
        if graded:
            answers[places] = (found.argmax(1) if kind == "classification" else found[:, 0]).cpu().numpy()
    model.train(was)
    mean = {"loss": loss / max(weight, 1)}
    if not graded:
        return mean
    truth = model.target.tensor(rows).numpy()
    return mean | scores(SCORES[kind], truth, answers.astype(truth.dtype))
