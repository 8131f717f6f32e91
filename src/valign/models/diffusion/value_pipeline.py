"""Generate with a value token: around a diffusers pipeline, or by this library's sampler (LiVO, arXiv 2410.12700)."""

import hashlib
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from valign.checks import UserError, check_range
from valign.interfaces import Guidance, Retriever, SamplingConfig
from valign.models.diffusion.base import Conditioning, DiffusionModel
from valign.models.diffusion.value_encoder import ValueEncoder, ValueText


class _Valued(str):
    """A prompt that gets a token; plain texts beside it (unconditional branch, guidance) do not. Equal if the principle is too."""

    value: ValueText

    def __new__(cls, prompt: str, value: ValueText) -> "_Valued":
        made = super().__new__(cls, prompt)
        made.value = value
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Valued) and (str(self), self.value) == (str(other), other.value)

    def __hash__(self) -> int:
        return hash((str(self), self.value))


class ValueGuidedPipeline:
    """A pipeline and a value encoder. An image without a principle is the base model's own, bit for bit.

    Guidance: only the conditional branch has the token. The unconditional branch, and every further text of a guidance, is encoded
    to the same number of tokens: in the ``reference`` layout padded to it, in the ``padded`` layout by one more copy of its last
    padding state (cross-attention does not see the order).

    Args:
        retriever: Finds each prompt's principle where a call names none. No token for one that the encoder was not trained for.
    Raises: UserError if the encoder was made for another base model.
    """

    def __init__(self, model: DiffusionModel, encoder: ValueEncoder, retriever: Retriever | None = None) -> None:
        if encoder.base_fingerprint != model.fingerprint():
            raise UserError(f"The value encoder belongs to another base model than {model.folder}. Load it for this model.")
        self.model, self.encoder, self.retriever = model, encoder, retriever

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        principle: str | None = None,
        negative_prompt: str = "",
        **options: Any,
    ) -> Any:
        """``pipe(prompt, ...)`` of diffusers, with its other options and its answer. All prompts share one principle.

        A retriever is asked only for a single prompt; several may call for different principles, which `generate` can do. Nothing
        is mixed here: whatever principle there is, every image gets its token.

        Raises: UserError for an unknown principle, or for prompt embeddings (the token is made from the text).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if given := sorted(name for name in options if name.endswith("prompt_embeds")):
            raise UserError(f"ValueGuidedPipeline must get texts, got {', '.join(given)}. Drop them, or call the pipeline itself.")
        if principle is None and self.retriever is not None and len(prompts) == 1:
            principle = self._retrieve(prompts[0])
        if principle is None or not self.encoder.active:
            texts = [negative_prompt] * len(prompts) if negative_prompt else None
            return self.model.pipe(prompts, negative_prompt=texts, **options)
        cond, negative = self.conditions(prompts, principle, negative_prompt)
        pooled: dict[str, Tensor | None] = {}
        if cond.pooled is not None:
            pooled = {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": negative.pooled}
        return self.model.pipe(prompt_embeds=cond.embeds, negative_prompt_embeds=negative.embeds, **pooled, **options)

    def conditions(self, prompts: Sequence[str], principle: str, negative: str = "") -> tuple[Conditioning, Conditioning]:
        """``(with the token, negative)``, of one length. In the reference layout all are as long as the longest prompt."""
        length = max(self._length(prompt) for prompt in prompts)
        value = self.encoder.principle(principle)
        return self._positive([_Valued(prompt, value) for prompt in prompts], length), self._negative(
            [negative] * len(prompts), length
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        guidance: Guidance | None = None,
        start: Sequence[Image] | None = None,
        strength: float = 0.7,
        progress: str | None = None,
        principles: str | Sequence[str | None] | None = None,
        mixing: float = 0.5,
    ) -> list[Image]:
        """`valign.models.diffusion.sampling.generate`, with a value token where there is a principle.

        Args:
            principles: One for all, or one per prompt; None gives no token, unless there is a retriever, which then decides.
            mixing: Share of images that get the token of a bias principle, [0, 1], chosen by each image's seed. Debiasing
                needs about 0.5: the token pulls towards the rare attribute, it does not balance by itself. Toxicity's is always on.
        Raises: UserError for an unknown principle; ValueError for unequal lengths or numbers out of range.
        """
        seeds = sampling.seeds(len(prompts)) if seeds is None else seeds
        check_range("ValueGuidedPipeline.mixing", mixing, low=0.0, high=1.0)
        if len(seeds) != len(prompts):
            raise ValueError(f"generate.seeds must hold one seed per prompt, got {len(seeds)} for {len(prompts)} prompts.")
        values = self._values(prompts, principles)
        if not self.encoder.active:
            values = [None] * len(values)
        texts: list[str] = list(prompts)
        groups: dict[int, list[int]] = {}  # length with a token, or 0 without -> rows
        for row, (prompt, value, seed) in enumerate(zip(prompts, values, seeds, strict=True)):
            if value is not None and (value.kind != "bias" or mixes(int(seed), mixing)):
                texts[row] = _Valued(prompt, value)
            groups.setdefault(self._length(prompt) if isinstance(texts[row], _Valued) else 0, []).append(row)
        images: dict[int, Image] = {}
        for length, rows in groups.items():
            model = self._with_token(length) if length else self.model
            made = model.generate(
                [texts[row] for row in rows],
                seeds=[seeds[row] for row in rows],
                sampling=sampling,
                guidance=guidance,
                start=None if start is None else [start[row] for row in rows],
                strength=strength,
                progress=progress,
            )
            images.update(zip(rows, made, strict=True))
        return [images[row] for row in range(len(prompts))]

    def _values(self, prompts: Sequence[str], principles: str | Sequence[str | None] | None) -> list[ValueText | None]:
        if principles is None:
            named: list[str | None] = [self._retrieve(prompt) for prompt in prompts]
        else:
            named = [principles] * len(prompts) if isinstance(principles, str) else list(principles)
        if len(named) != len(prompts):
            raise ValueError(f"generate.principles must be one, or one per prompt, got {len(named)} for {len(prompts)} prompts.")
        return [None if name is None else self.encoder.principle(name) for name in named]

    def _retrieve(self, prompt: str) -> str | None:
        found = self.retriever.retrieve(prompt) if self.retriever is not None else None
        return found if found in {principle.id for principle in self.encoder.principles} else None

    def _length(self, prompt: str) -> int:
        """Tokens of the prompt's part: all 77 in the padded layout, else those it has, at most 76 with start and end."""
        tokenizers = self.encoder.tokenizers
        longest = min(int(tokenizer.model_max_length) for tokenizer in tokenizers)
        if self.encoder.layout == "padded":
            return longest
        counts = [len(tokenizer(prompt, truncation=True, max_length=longest - 1).input_ids) for tokenizer in tokenizers]
        return max(counts)

    def _positive(self, prompts: Sequence[_Valued], length: int) -> Conditioning:
        text = self.model.encode_prompts(list(map(str, prompts)), length=length)
        ids = torch.cat([self.encoder.tokenize(prompt.value, [prompt]) for prompt in prompts])
        with torch.no_grad():
            token = self.encoder(ids.to(self.encoder.device)).to(text.embeds)
        return Conditioning(torch.cat([token[:, None], text.embeds], dim=1), text.pooled, text.time_ids)

    def _negative(self, texts: Sequence[str], length: int) -> Conditioning:
        if self.encoder.layout == "reference":
            return self.model.encode_prompts(texts, length=length + 1)
        text = self.model.encode_prompts(texts, length=length)
        return Conditioning(torch.cat([text.embeds, text.embeds[:, -1:]], dim=1), text.pooled, text.time_ids)

    def _with_token(self, length: int) -> DiffusionModel:
        """The model as the sampler sees it: it encodes prompts that get the token with it, all others to the same length."""
        view = copy(self.model)  # shares the pipeline and its weights

        def encode(prompts: Sequence[str]) -> Conditioning:
            if isinstance(prompts[0], _Valued):
                return self._positive(prompts, length)  # type: ignore[arg-type]  # then all are
            return self._negative(prompts, length)

        view.encode_prompts = encode  # type: ignore[method-assign, assignment]
        return view


def mixes(seed: int, share: float) -> bool:
    """Whether an image of this seed is among the ``share`` that get the token; fixed by the seed alone, uniform over seeds."""
    digest = hashlib.sha256(f"value mixing {seed}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
