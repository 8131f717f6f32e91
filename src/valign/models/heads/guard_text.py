"""The guard's encoder under the guard's head, as something to fine-tune on labelled texts: what becomes of detection meanwhile?

Two heads read one network: a fresh linear one learns the texts' classes, and the guard's own, frozen, answers the prompts of the
calibration rows. Its columns are so many yes/no answers, so cross-entropy and divergence of "words" are theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from valign.checks import UserError
from valign.data.tasks.texts import TextRow
from valign.files import hash_value
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.ngrams import bag_of
from valign.models.heads.prompt_head import Head, head_logits, sentence_vectors
from valign.models.heads.task_model import NOT_COUNTED, Target, TaskBatch
from valign.models.language.text_model import TextModel, load_text_model
from valign.text import clean

UPPER = "upper."  # prefix of the encoder's weights that are the head's own


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and what each column of the guard should say of it: 1 is yes, 0 no."""

    prompt: str
    answers: tuple[int, ...]
    target: ClassVar[None] = None

    @property
    def size(self) -> int:
        return len(self.prompt)

    @property
    def content(self) -> str:
        return self.prompt


class GuardTextModel(TextModel):
    """A `TextModel` whose calibration rows are prompts that the guard's head judges.

    For prompts an answer is logits ``[row, 1 + column, word]`` of "no" and "yes". As in a language model, place ``t``
    predicts place ``t + 1`` of the target, so place 0 of the target is not counted and the last logits are of nothing.
    """

    worded_calibration: ClassVar[bool] = True

    def __init__(self, guard: Head, base: TextModel, *, seed: int) -> None:
        fingerprint = hash_value([base.fingerprint, guard.sha256])
        settings: dict[str, Any] = {"pairs": "together", "max_tokens": base.max_tokens, "fingerprint": fingerprint, "seed": seed}
        super().__init__(base.network, base.tokenizer, base.target, **settings)
        self.guard = guard

    def batch(self, rows: Sequence[TextRow | PromptRow]) -> TaskBatch:
        """Texts with their classes, or prompts with their columns; not both."""
        prompts = [row for row in rows if isinstance(row, PromptRow)]
        if not prompts:
            return super().batch(rows)  # type: ignore[arg-type]
        seen = [self.guard.settings.neutral(clean(row.prompt)) for row in prompts]
        grams, starts = (tensor.to(self.device) for tensor in bag_of(seen, self.guard.settings.buckets))
        target = torch.tensor([(NOT_COUNTED, *row.answers) for row in prompts], device=self.device)
        inputs = {**self._tokens(seen), "grams": grams, "starts": starts}
        return TaskBatch(inputs, target, len(prompts) * len(self.guard.settings.columns))

    def forward(self, batch: TaskBatch) -> Tensor:
        """Logits ``[row, class]`` of texts, ``[row, 1 + column, word]`` of prompts."""
        return self._answers(batch.inputs) if "grams" in batch.inputs else super().forward(batch)

    def summed(self, answer: Tensor, batch: TaskBatch) -> Float[Tensor, ""]:
        """Cross-entropy in nats, summed over texts, or over the columns of prompts."""
        if "grams" not in batch.inputs:
            return super().summed(answer, batch)
        return cross_entropy(answer[:, :-1].flatten(0, 1), batch.target[:, 1:].flatten(), reduction="sum", ignore_index=NOT_COUNTED)

    def trained_guard(self) -> tuple[Head, MiniLM]:
        """The guard as the training has left its encoder; the adapter is merged into the network, so this is the end.

        Raises: UserError where layers that the head shares with others were changed by an adapter that cannot be merged.
        """
        if isinstance(self.network, PeftModel):
            self.network = self.network.merge_and_unload()  # type: ignore[operator]
        state = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        encoder = MiniLM()
        if missing := [name for name in encoder.weights if name not in state and not name.startswith("pooler.")]:
            raise UserError(f"The network must be a plain encoder after training, got none of {missing[0]}. Use another adapter.")
        encoder.weights |= {name: state[name] for name in encoder.weights if name in state}
        own = {name: state[name.removeprefix(UPPER)] for name in self.guard.weights if name.startswith(UPPER)}
        return replace(self.guard, weights={**self.guard.weights, **own}), encoder

    def _answers(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "row place word"]:
        tokens = {name: tensor for name, tensor in inputs.items() if name not in ("grams", "starts")}
        hidden = self.network(**tokens).last_hidden_state
        weights = {name: tensor.to(hidden.device) for name, tensor in self.guard.weights.items() if not name.startswith(UPPER)}
        vectors = sentence_vectors(hidden, tokens["attention_mask"].bool(), weights)
        yes = head_logits(weights, vectors, inputs["grams"], inputs["starts"])
        return pad(torch.stack([torch.zeros_like(yes), yes], dim=2), (0, 0, 0, 1))


def load_guard_text_model(guard: Head, target: Target, *, seed: int, max_tokens: int = 128) -> GuardTextModel:
    """all-MiniLM on the CPU with the head's own layers in place of the published ones, nothing trainable.

    Args:
        target: Of the texts that are learnt. seed: Of their head.
    Raises: UserError if the head was trained on another encoder.
    """
    base = load_text_model("minilm", target, max_tokens=max_tokens, seed=seed, device="cpu")
    if guard.settings.encoder_sha256 != base.fingerprint:
        raise UserError(
            "load_guard_text_model.guard was trained on another encoder. Train it again, or install the encoder it names."
        )
    known = dict(base.network.named_parameters())
    for name, tensor in guard.weights.items():
        if name.startswith(UPPER):
            known[name.removeprefix(UPPER)].data.copy_(tensor)
    return GuardTextModel(guard, base, seed=seed).requires_grad_(False)
