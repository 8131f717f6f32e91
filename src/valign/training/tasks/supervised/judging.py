"""The model's answers to held-out rows, and how good they are."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from valign.data.tasks.base import SCORES, TaskRow
from valign.models.heads.task_model import TaskModel
from valign.training.tasks.supervised.scores import scores

ANSWERED = ("classification", "regression")  # kinds with one answer per row, right or wrong


@torch.no_grad()
def judge(model: TaskModel, rows: Sequence[TaskRow], *, batch_size: int) -> dict[str, float]:
    """``loss`` as `mean_loss`, and every score of the task's kind, in evaluation mode."""
    was = model.training
    loss, answers = _asked(model.eval(), rows, batch_size)
    found = {"loss": loss} | model.graded(rows)
    model.train(was)
    if model.target.kind not in ANSWERED:
        return found
    truth = model.target.tensor(rows).numpy()
    return found | scores(SCORES[model.target.kind], truth, answers.astype(truth.dtype))


@torch.no_grad()
def mean_loss(model: TaskModel, rows: Sequence[TaskRow], *, batch_size: int) -> float:
    """Mean per row, or per token of a language model, in evaluation mode."""
    was = model.training
    loss, _ = _asked(model.eval(), rows, batch_size)
    model.train(was)
    return loss


def _asked(model: TaskModel, rows: Sequence[TaskRow], batch_size: int) -> tuple[float, Float[np.ndarray, " row"]]:
    """The mean loss, and the answers where there is one per row.

    Rows of like length are read together, so the order of ``rows`` changes nothing but rounding.
    """
    order = sorted(range(len(rows)), key=lambda place: rows[place].size)
    loss, weight, answers, kind = 0.0, 0, np.zeros(len(rows)), model.target.kind
    for first in range(0, len(rows), batch_size):
        places = order[first : first + batch_size]
        batch = model.batch([rows[place] for place in places])
        found = model(batch).float()
        loss, weight = loss + float(model.summed(found, batch)), weight + batch.weight
        if kind in ANSWERED:
            answers[places] = (found.argmax(1) if kind == "classification" else found[:, 0]).cpu().numpy()
    return loss / max(weight, 1), answers
