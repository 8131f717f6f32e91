"""LiVO's value encoder: one more token for a frozen model, made from a value principle and the prompt (arXiv 2410.12700).

``token = ValueEncoder("<principle>, <prompt>")`` stands before the prompt's embeddings: ``cond = [token, e_1 .. e_L]``.
Cross-attention takes any length, so no weight of the model changes, and without the token the model is the base model, bit for bit.

SD 1.x and 2.x: a copy of the text encoder; the token is the state at the end-of-text token after the final norm, the authors' way.
SDXL (ours): copies of both text encoders; the token is both states at the end-of-text token in the last layer but one, side by
side, for that is where SDXL's U-Net reads its prompts. The pooled prompt vector stays the prompt's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valign.checks import UserError, check_choice, check_range, close_to
from valign.files import atomic_path, hash_value, read_json, write_json
from valign.methods import Method
from valign.models.diffusion.base import Conditioning, DiffusionModel
from valign.models.diffusion.prompt_states import end_states

METHOD = Method(
    slug="value-encoder",
    title="LiVO's value encoder: one token before the prompt, beside a frozen model",
    paper="arXiv 2410.12700",
    room="models",
    entry="valign.models.diffusion.value_encoder:ValueEncoder",
    fidelity="exact",
    note="the authors' token and its place; SDXL's second encoder, padded layouts and a LoRA instead of the whole "
    "encoder are extensions",
)

LAYOUTS = ("reference", "padded")
WEIGHTS, RECORD = "value_encoder.safetensors", "value_encoder.json"
FORMAT = 1
LORA = "value"  # the adapter's name inside the copies
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class ValueText:
    """A principle as the encoder knows it: trained and asked with the same words."""

    id: str
    text: str
    aliases: tuple[str, ...] = ()
    kind: str = "toxicity"  # the policy's word: toxicity's token is always on, bias's is mixed in

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> ValueText:
        """From what JSON keeps of one."""
        return cls(**{**entry, "aliases": tuple(entry["aliases"])})


class ValueEncoder(nn.Module):
    """Copies of a pipeline's text encoders that answer one token; float32. Make one with `copy_encoder` or `load_value_encoder`."""

    def __init__(
        self,
        model: DiffusionModel,
        principles: Sequence[ValueText],
        *,
        layout: str = "reference",
        lora_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """See `copy_encoder`."""
        super().__init__()
        check_choice("ValueEncoder.layout", layout, LAYOUTS)
        if not principles or len({principle.id for principle in principles}) < len(principles):
            raise UserError(f"ValueEncoder.principles must be one or more of distinct ids, got {[p.id for p in principles]}.")
        self.principles = tuple(principles)
        self.layout, self.lora_rank, self.family = layout, lora_rank, model.family
        self.base_fingerprint = model.fingerprint()
        self.active = True  # see `off`
        self.tokenizers = list(model.tokenizers)
        self.ends = [int(tokenizer.eos_token_id) for tokenizer in self.tokenizers]
        model.pool.need("text")
        self.encoders = nn.ModuleList(deepcopy(encoder).float().to(model.device) for encoder in model.text_encoders)
        dim, wanted = sum(encoder.config.hidden_size for encoder in self._copies), model.text_width
        if dim != wanted:
            raise UserError(
                f"{model.folder} cannot take a value token: its text encoders are {dim} wide, its cross-attention {wanted}. "
                "Choose a model whose U-Net reads the text encoder directly."
            )
        self.encoders.requires_grad_(False)
        if lora_rank is not None:
            check_range("ValueEncoder.lora_rank", float(lora_rank), low=1.0)
            _add_lora(self._copies, lora_rank, seed, self._used)
        for name, parameter in self.encoders.named_parameters():
            parameter.requires_grad_(f".{LORA}." in name if lora_rank is not None else self._used(name))

    @property
    def _double(self) -> bool:
        return self.family == "sdxl"

    @property
    def _copies(self) -> list[Any]:
        return list(self.encoders)

    def _used(self, name: str) -> bool:
        """Whether the token depends on the parameter; SDXL's token leaves the last layer out."""
        if not self._double:
            return True
        last = self._copies[int(name.split(".")[0])].config.num_hidden_layers - 1
        return not any(part in name for part in (f"layers.{last}.", "final_layer_norm", "text_projection"))

    def principle(self, name: str | ValueText) -> ValueText:
        """The principle of that id, text or alias. Raises: UserError that lists the ids, also for several at once."""
        if isinstance(name, ValueText):
            name = name.id
        if not isinstance(name, str):
            raise UserError(f"An image takes one principle, got {name!r}. Several at once are not defined; choose one.")
        wanted = name.casefold().strip()
        for principle in self.principles:
            if wanted in (text.casefold() for text in (principle.id, principle.text, *principle.aliases)):
                return principle
        known = [principle.id for principle in self.principles]
        raise UserError(f"principle must be one of {', '.join(known)}; got {name!r}.{close_to(name, known)}")

    def tokenize(self, principle: ValueText, prompts: Sequence[str]) -> Int[Tensor, "batch encoder tokens"]:
        """``"<principle>, <prompt>"`` for each encoder, principle first, cut off at the tokenizer's length (77)."""
        texts = [f"{principle.text}, {prompt}" for prompt in prompts]
        rows = [
            tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
            for tokenizer in self.tokenizers
        ]
        return torch.stack([row.input_ids for row in rows], dim=1)

    def forward(self, ids: Int[Tensor, "batch encoder tokens"]) -> Float[Tensor, "batch dim"]:
        """The tokens, float32; gradients flow where the caller lets them."""
        parts = []
        for encoder, end, rows in zip(self._copies, self.ends, ids.unbind(1), strict=True):
            answer = encoder(rows, output_hidden_states=self._double)
            states = answer.hidden_states[-2] if self._double else answer.last_hidden_state
            parts.append(end_states(states, rows, end))
        return torch.cat(parts, dim=-1)

    def token(self, principle: str | ValueText, prompts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """The token of each prompt under one principle."""
        return self(self.tokenize(self.principle(principle), prompts).to(self.device))

    def fingerprint(self) -> str:
        """SHA-256 of the base model, the layout, the principles and the encoder's own weights, hex."""
        weights = {
            name: hashlib.sha256(p.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, p in self.encoders.named_parameters()
        }
        return hash_value([self.base_fingerprint, self.layout, [asdict(p) for p in self.principles], weights])

    @property
    def device(self) -> torch.device:
        return next(self.encoders.parameters()).device

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, sorted: all that the token depends on, or the LoRA's factors."""
        return {name: p for name, p in sorted(self.encoders.named_parameters()) if p.requires_grad}

    @contextmanager
    def off(self) -> Iterator[None]:
        """No token inside: a `ValueConditioning` is the bare prompt's, `ValueGuidedPipeline` the base model."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before


class ValueConditioning(Conditioning):
    """A batch's prompts with the value token in front, encoded when the U-Net asks for it, so that gradients reach the encoder."""

    text: Conditioning
    ids: Int[Tensor, "batch encoder tokens"]
    encoder: ValueEncoder
    copies: int

    def __init__(
        self, text: Conditioning, ids: Int[Tensor, "batch encoder tokens"], encoder: ValueEncoder, copies: int = 1
    ) -> None:
        """Args: copies: how often the rows of ``text`` and ``ids`` occur, one after the other; they are encoded once."""
        if len(text) != len(ids):
            raise ValueError(f"ValueConditioning must get one value text per prompt, got {len(ids)} for {len(text)} prompts.")
        for name, value in {"text": text, "ids": ids, "encoder": encoder, "copies": copies}.items():
            object.__setattr__(self, name, value)

    @property
    def _all(self) -> Conditioning:
        return self.text.repeat(self.copies)

    @property
    def embeds(self) -> Float[Tensor, "batch tokens dim"]:  # type: ignore[override]
        if not self.encoder.active:
            return self._all.embeds
        token = self.encoder(self.ids.to(self.encoder.device)).to(self.text.embeds)
        return torch.cat([token[:, None], self.text.embeds], dim=1).repeat(self.copies, 1, 1)

    @property
    def pooled(self) -> Float[Tensor, "batch pooled"] | None:  # type: ignore[override]
        return self._all.pooled

    @property
    def time_ids(self) -> Float[Tensor, "batch six"] | None:  # type: ignore[override]
        return self._all.time_ids

    def __len__(self) -> int:
        return self.copies * len(self.ids)

    def select(self, rows: Tensor | slice | list[int]) -> ValueConditioning:
        return ValueConditioning(self._all.select(rows), self.ids.repeat(self.copies, 1, 1)[rows], self.encoder)

    def repeat(self, n: int) -> ValueConditioning:
        return ValueConditioning(self.text, self.ids, self.encoder, self.copies * n)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ValueConditioning:
        return ValueConditioning(self.text.to(device, dtype), self.ids, self.encoder, self.copies)


def copy_encoder(
    model: DiffusionModel,
    principles: Sequence[ValueText],
    *,
    layout: str = "reference",
    lora_rank: int | None = None,
    seed: int = 0,
) -> ValueEncoder:
    """A fresh value encoder for ``model``, equal to its text encoder(s).

    Args:
        principles: One or more, of distinct ids.
        layout: How images are generated. ``"reference"``: the prompt cut to 76 tokens and unpadded, as the authors' inference;
            ``"padded"``: 77 tokens and the token, as in training. Compare with the base model in the same layout.
        lora_rank: Train factors of this rank in the attention of the copies instead of all weights; ours, 1 or more.
        seed: Of the LoRA's down factors.
    Raises: UserError if the widths do not fit or the principles are none.
    """
    return ValueEncoder(model, principles, layout=layout, lora_rank=lora_rank, seed=seed)


def save_value_encoder(folder: Path, encoder: ValueEncoder, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write what was trained, and nothing of the base model: ``value_encoder.safetensors`` and ``value_encoder.json``.

    Raises: UserError if a number is NaN or infinite.
    """
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in encoder.trained().items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{folder}: the value encoder must be finite, got NaN or infinity in {bad[0]}. Look at what made it.")
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    record = {
        "format": FORMAT,
        "family": encoder.family,
        "base_fingerprint": encoder.base_fingerprint,
        "layout": encoder.layout,
        "lora_rank": encoder.lora_rank,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "principles": [asdict(principle) for principle in encoder.principles],
    }
    write_json(folder / RECORD, {**record, "metadata": dict(metadata or {})})


def load_value_encoder(path: str | Path, model: DiffusionModel, *, layout: str | None = None) -> ValueEncoder:
    """Read a value encoder from its folder, its weight file or a training run's folder, frozen, for the model it was trained with.

    Args:
        layout: Another layout than the one it was saved with.
    Raises: UserError if it is missing, damaged, or of another base model.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path / "values" if (path / "values").is_dir() else path
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder / RECORD} must be of format {FORMAT}. Train the value encoder again with this version.")
    if record["base_fingerprint"] != model.fingerprint():
        raise UserError(
            f"{folder} was trained for base model {record['base_fingerprint'][:12]} ({record['family']}), the model given is "
            f"{model.fingerprint()[:12]} ({model.family}). Use that base model, or train a value encoder for this one."
        )
    encoder = copy_encoder(
        model, list(map(ValueText.read, record["principles"])), layout=layout or record["layout"], lora_rank=record["lora_rank"]
    )
    parameters = encoder.trained()
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} could not be read: {error}. Copy it again, or train it again.") from error
    if sorted(tensors) != sorted(parameters) or any(tensors[name].shape != p.shape for name, p in parameters.items()):
        raise UserError(f"{folder / WEIGHTS} does not fit its {RECORD}. Copy both files of one training.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    encoder.requires_grad_(False)
    return encoder


def _add_lora(encoders: list[Any], rank: int, seed: int, used: Any) -> None:
    """LoRA of scale 1 in the attention of the copies: A ~ N(0, 1 / rank^2) by name and seed, B = 0, so the token is unchanged."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    for index, encoder in enumerate(encoders):
        targets = [
            name
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(LORA_TARGETS) and used(f"{index}.{name}.")
        ]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), encoder, adapter_name=LORA)
        layers: dict[str, Any] = {name: module for name, module in encoder.named_modules() if isinstance(module, LoraLayer)}
        for name, module in layers.items():
            digest = hashlib.sha256(f"{seed}:{index}.{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            down, up = module.lora_A[LORA].weight, module.lora_B[LORA].weight
            with torch.no_grad():
                down.copy_(torch.randn(down.shape, generator=generator) / rank)
                up.zero_()
