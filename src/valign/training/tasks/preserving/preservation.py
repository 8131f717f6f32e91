"""One plan for a training: what its rows cost, which rows stand beside them, and what is added to a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from valign.adapters.base import CountedLoss
from valign.checks import UserError
from valign.data.tasks.base import TaskRow
from valign.models.heads.task_model import TaskBatch, TaskModel
from valign.models.language.chat_task import ChatTaskModel, TokenRow
from valign.objectives import AGL, AnswerTokens, KlToStart, SafeAlign, SafetyRecovery, TokenObjective
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.tasks.preserving.agl_penalty import AglPenalty
from valign.training.tasks.preserving.data import PreserveData, check_plan
from valign.training.tasks.preserving.star_scores import score_chats
from valign.training.tasks.preserving.start_answers import StartAnswers


class Preservation:
    """The objectives of ``--preserve`` in one training; a hook of its loop.

    Order: `start` before the adapter is attached, so that every reference is the model as it was; `attached` after; then, in each
    step, `joined`, `summed` and `beside`.

    Args:
        objectives: By name, as `parse_preserving` gives them.
        data: The rows beside the training rows.
        model: As it was loaded, without an adapter.
        steps, batch_size, seed: Of the training.
        forgetting_start: The adapter's start reads the rows to forget (FILA).
    Raises: UserError for what cannot work together, before any work.
    """

    spent, settled = 0, True

    def __init__(
        self,
        objectives: Mapping[str, Any],
        data: PreserveData,
        model: TaskModel,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        forgetting_start: bool = False,
    ) -> None:
        worded = model.worded_calibration
        check_plan(objectives, data, model.target.kind, forgetting_start=forgetting_start, worded_calibration=worded)
        if "kl" in objectives and getattr(model, "buckets", False):
            raise UserError(
                "--preserve kl must go with images of one size, got --buckets (the default). Add --no-buckets, or use agl."
            )
        self.objectives, self.data, self.model = objectives, data, model
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        tokens = {name: one for name, one in objectives.items() if isinstance(one, TokenObjective)}
        self.training = next((one for one in tokens.values() if one.rows == "training"), None)
        self.terms = {name: one for name, one in tokens.items() if one.rows != "training"}
        self.recovery: SafetyRecovery | None = next((o for o in objectives.values() if isinstance(o, SafetyRecovery)), None)
        self.agl: AGL | None = next((one for one in objectives.values() if isinstance(one, AGL)), None)
        self.penalty_of: AglPenalty | None = None
        self._starts: dict[str, StartAnswers] = {}
        self._moved: dict[int, Tensor] = {}  # answers of the start to the calibration images, by step
        self._scores: dict[str, Tensor] = {}

    @property
    def retain_weight(self) -> float:
        """Of the training rows: less than 1 where they only stand beside rows to forget."""
        return next((float(one.retain_weight) for one in self.terms.values() if one.rows == "forget"), 1.0)  # type: ignore[attr-defined]

    def recipe(self) -> dict[str, Any]:
        """JSON-able; what shapes the result."""
        return {
            "objectives": {name: asdict(one) for name, one in self.objectives.items()},
            "rows_per_step": self.data.rows_per_step,
        }

    def start(self, rows: Sequence[TaskRow], *, batch_size: int) -> None:
        """Keep what the model says before it is trained; ``rows`` are those that the training will visit."""
        if self.training is not None:
            needs = self.training.needs
            if "safe" in needs:
                assert isinstance(self.model, ChatTaskModel)
                assert self.data.guard is not None
                self._scores = score_chats(self.model, rows, self.data.guard)  # type: ignore[arg-type]
            if "reference" in needs or "reference_words" in needs:
                self._starts["training"] = self._answers(rows, self.training, batch_size)
        for name, one in self.terms.items():
            if self.model.target.kind == "diffusion":
                self._moved = {step: self._image_answer(step) for step in range(self.steps)}
            elif "reference" in one.needs or "reference_words" in one.needs:
                self._starts[name] = self._answers(self._pool(one), one, batch_size)

    def attached(self) -> None:
        """The adapter sits on the model."""
        if self.agl is not None:
            rows = self.data.calibration
            self.penalty_of = AglPenalty(self.agl, self.model, rows, steps=self.steps, seed=self.seed)

    def joined(self, step: int) -> list[TokenRow]:
        """Rows that share the mean of the training rows of step ``step`` (from 0)."""
        if self.recovery is None:
            return []
        assert isinstance(self.model, ChatTaskModel)
        found = []
        for place, visit in Visits(len(self.data.pairs), self.recovery.rows_beside(self.batch_size), self.seed).at(step):
            pair, draws = self.data.pairs[place], generator_for("recovery", self.seed, place, visit)
            safe, unsafe = (self.model.renderer.chat(side.messages) for side in (pair.safe, pair.unsafe))
            first, last = safe.turns[-1]
            before, (start, end) = safe.ids[:first], unsafe.turns[-1]
            harmful = [token for token in unsafe.ids[start:end] if token not in self.model.renderer.stop_ids]
            ids, taught, _ = self.recovery.row(before, harmful, safe.ids[first:last], draws)
            found.append(TokenRow(tuple(ids), tuple(taught), (0,) * len(ids)))
        return found

    def summed(self, rows: Sequence[TaskRow], batch: TaskBatch) -> tuple[Tensor, Tensor | None]:
        """Loss summed over the trained tokens (or rows) of training rows, and plain cross-entropy where that differs."""
        if self.training is None:
            return self.model.loss(batch), None
        tokens = self._tokens(self.training, rows, batch, self._starts.get("training"))
        plain = -(tokens.log_probs * tokens.mask).sum()
        return self.training(tokens).sum(), plain.detach()

    def beside(self, step: int) -> Iterator[tuple[str, Tensor]]:
        """What is added to the mean loss of step ``step``, one at a time, by name; each has a graph of its own."""
        if self.penalty_of is not None:
            self.penalty_of.note_gradients()
        for name, one in self.terms.items():
            yield name, self._term(name, one, step)
        if self.penalty_of is not None:
            terms = self.penalty_of.terms(step)
            total = torch.stack(list(terms.values())).sum()
            if total.requires_grad:
                yield "agl", total

    def forgetting(self, rows: Sequence[TaskRow]) -> list[tuple[CountedLoss, CountedLoss]]:
        """Every batch of rows to forget, each with one of ``rows`` to retain, as mean losses with their tokens."""
        forget, size = self.data.forget, self.batch_size
        count = -(-len(forget) // size)
        retain = Visits(len(rows), size, self.seed)
        parts = [forget[number * size : (number + 1) * size] for number in range(count)]
        others = [[rows[place] for place, _ in retain.at(number)] for number in range(count)]
        return [(partial(self._counted, one), partial(self._counted, other)) for one, other in zip(parts, others)]

    def penalty(self) -> Tensor | None:
        """None: what is added to a step is in its `beside`."""
        return None

    def after_step(self, step: int) -> None:
        if self.penalty_of is not None:
            self.penalty_of.after_step(step)

    def extra(self) -> dict[str, Any]:
        return self.penalty_of.extra() if self.penalty_of is not None else {}

    def restore(self, extra: Mapping[str, Any]) -> None:
        if self.penalty_of is not None:
            self.penalty_of.restore(extra)

    def _term(self, name: str, objective: TokenObjective, step: int) -> Tensor:
        if self.model.target.kind == "diffusion":
            assert isinstance(objective, KlToStart)
            batch = self._image_batch(step)
            moved = (self.model(batch).float() - self._moved[step].to(self.model.device)).square().mean((1, 2, 3))
            return objective.weight * moved.mean()
        rows, colours = self._rows_of(objective, step)
        batch = self.model.batch(rows)
        tokens = self._tokens(objective, rows, batch, self._starts.get(name), colours)
        return objective.loss(tokens)

    def _rows_of(self, objective: TokenObjective, step: int) -> tuple[list[Any], Tensor | None]:
        """Rows of a step, and for SAFE-ALIGN the colour of each."""
        pool, size = self._pool(objective), self.data.rows_per_step or self.batch_size
        places = [place for place, _ in Visits(len(pool), size, self.seed).at(step)]
        rows = [pool[place] for place in places]
        if not isinstance(objective, SafeAlign):
            return rows, None
        if objective.strategy == "A" or step < objective.red_start_step:
            return rows, torch.ones(len(rows), dtype=torch.long)
        red = [self.data.pairs[place].unsafe for place in places]
        return [*rows, *red], torch.tensor([1] * len(rows) + [-1] * len(red))

    def _pool(self, objective: TokenObjective) -> tuple[Any, ...]:
        return self.data.forget if objective.rows == "forget" else self.data.calibration

    def _tokens(
        self,
        objective: TokenObjective,
        rows: Sequence[Any],
        batch: TaskBatch,
        start: StartAnswers | None,
        polarity: Tensor | None = None,
    ) -> AnswerTokens:
        needs, labels, more = objective.needs, batch.target, dict[str, Any]()
        if "reference" in needs:
            assert start is not None
            more["reference"] = start.log_probs(rows, labels)
        if "reference_words" in needs:
            assert start is not None
            more["reference_words"] = start.words(rows, labels)
        if "safe" in needs:
            more["safe"] = torch.zeros(labels.shape[0], labels.shape[1] - 1, device=labels.device)
            for place, row in enumerate(rows):
                known = self._scores[row.content]
                more["safe"][place, : len(known) - 1] = known[1:].to(labels.device)
        if isinstance(self.model, ChatTaskModel):
            more["turns"] = self.model.turns(rows)[:, 1:]
        if polarity is not None:
            more["polarity"] = polarity.to(labels.device)
        return AnswerTokens.of(self.model(batch).float(), labels, vocabulary="words" in needs, **more)

    def _answers(self, rows: Sequence[TaskRow], objective: TokenObjective, batch_size: int) -> StartAnswers:
        words = "reference_words" in objective.needs
        return StartAnswers(self.model, rows, words=words, batch_size=batch_size, label="answers before training")

    def _counted(self, rows: Sequence[TaskRow]) -> tuple[Tensor, int]:
        batch = self.model.batch(rows)
        return self.model.loss(batch) / batch.weight, batch.weight

    def _image_batch(self, step: int) -> TaskBatch:
        """Calibration images of a step, at draws of their own."""
        size = self.data.rows_per_step or self.batch_size
        rows = [self.data.calibration[place] for place, _ in Visits(len(self.data.calibration), size, self.seed).at(step)]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(generator_for("preserve", self.seed, step).initial_seed())
            return self.model.batch(rows)

    @torch.no_grad()
    def _image_answer(self, step: int) -> Tensor:
        """Of the model now, without dropout, to the batch that training will draw."""
        was = self.model.training
        batch = self._image_batch_in_training(step)
        answer = self.model.eval()(batch).float().cpu()
        self.model.train(was)
        return answer

    def _image_batch_in_training(self, step: int) -> TaskBatch:
        self.model.train()  # draws of training depend on the step, those of evaluation do not
        return self._image_batch(step)
