"""What the model said before it was trained: the reference of every objective, stored, so that no adapter can move it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.tasks.base import TaskRow
from valign.models.heads.task_model import NOT_COUNTED, TaskModel
from valign.objectives import AnswerTokens
from valign.progress import track

MOST_BYTES = 4 * 2**30  # of whole distributions in memory


class StartAnswers:
    """Log-probabilities of rows under the model as it is now, in evaluation mode, on the CPU.

    Args:
        words: Keep the whole distribution at each trained place, for divergences.
    Raises: UserError if that would need more than 4 GiB.
    """

    def __init__(self, model: TaskModel, rows: Sequence[TaskRow], *, words: bool, batch_size: int, label: str) -> None:
        self._log_probs: dict[str, Tensor] = {}
        self._words: dict[str, Tensor] = {}
        distinct = list({row.content: row for row in rows}.values())
        ordered = sorted(distinct, key=lambda row: row.size)
        was = model.training
        model.eval()
        with torch.no_grad():
            for first in track(range(0, len(ordered), batch_size), label):
                self._add(model, ordered[first : first + batch_size], words, len(ordered))
        model.train(was)

    def _add(self, model: TaskModel, rows: Sequence[TaskRow], words: bool, count: int) -> None:
        batch = model.batch(rows)
        found = AnswerTokens.of(model(batch).float(), batch.target, vocabulary=words)
        for place, row in enumerate(rows):
            mask = found.mask[place]
            self._log_probs[row.content] = found.log_probs[place, mask].cpu()
            if words:
                assert found.words is not None
                kept = found.words[place, mask].cpu()
                size = kept.numel() * kept.element_size() * count
                if not self._words and size > MOST_BYTES:
                    raise UserError(
                        f"The start's distributions must fit into {MOST_BYTES / 2**30:g} GiB, got about {size / 2**30:.1f} for "
                        f"{count} rows of {len(kept)} trained tokens and {kept.shape[1]} words. Use fewer or shorter rows."
                    )
                self._words[row.content] = kept

    def log_probs(self, rows: Sequence[TaskRow], labels: Tensor) -> Float[Tensor, "row place"]:
        """Of the trained tokens of a batch with these labels (`TaskBatch.target`); 0 elsewhere."""
        mask = labels[:, 1:] != NOT_COUNTED
        out = torch.zeros(mask.shape, device=labels.device)
        out[mask] = torch.cat([self._log_probs[row.content] for row in rows]).to(out)
        return out

    def words(self, rows: Sequence[TaskRow], labels: Tensor) -> Float[Tensor, "row place word"]:
        """Whole distributions at the trained places of a batch; 0 elsewhere."""
        mask = labels[:, 1:] != NOT_COUNTED
        known = torch.cat([self._words[row.content] for row in rows])
        out = torch.zeros(*mask.shape, known.shape[1], device=labels.device)
        out[mask] = known.to(out)
        return out
