"""The experts that SG-LoRA learns from, and what a description makes of them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from valign.checks import check_range
from valign.files import hash_value

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoraSchema:
    """Names, shapes and dtype of a LoRA's tensors in sorted order: what a flat vector of parameters stands for."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "LoraSchema":
        """Of a state dict that holds nothing but LoRA factors.

        Raises: ValueError for other tensors (DoRA magnitudes, modules_to_save), mixed dtypes or an empty state.
        """
        others = [name for name in sorted(state) if not name.endswith((DOWN, UP))]
        if others or not state:
            raise ValueError(f"LoraSchema.state must hold LoRA factors alone, got {others[0] if others else 'nothing'}.")
        dtypes = {tensor.dtype for tensor in state.values()}
        if len(dtypes) > 1:
            raise ValueError(f"LoraSchema.state must be of one dtype, got {', '.join(sorted(map(str, dtypes)))}.")
        return cls({name: tuple(state[name].shape) for name in sorted(state)}, dtypes.pop())

    @property
    def size(self) -> int:
        """P, numbers in all."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [torch.Size(shape).numel() for shape in self.shapes.values()]

    def flatten(self, state: Mapping[str, Tensor]) -> Float[Tensor, " size"]:
        """All parameters in one vector, float32 at least."""
        return torch.cat([_wide(state[name]).flatten() for name in self.shapes])

    def unflatten(self, vector: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """The inverse of `flatten`, bit for bit, in the schema's dtype."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape).to(self.dtype) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class TaskExpert:
    """One trained LoRA: its task in words, and its parameters at the last M epochs (the paper: 100)."""

    name: str
    description: str  # the paper's template: "a photo of a <class>"
    checkpoints: Sequence[Mapping[str, Tensor]]  # as peft's `get_peft_model_state_dict` gives them
    config: Mapping[str, Any] = field(default_factory=dict)  # arguments of peft.LoraConfig: r, lora_alpha, target_modules
    start: str = ""  # `fingerprint` of the factors before training; experts can be averaged only if they share it
    variances: Mapping[str, Tensor] | None = None  # of each parameter, where the checkpoints are too few to tell


@dataclass(frozen=True)
class ExpertLibrary:
    """What is known of all experts; row e of every tensor is expert e."""

    schema: LoraSchema
    names: tuple[str, ...]
    config: Mapping[str, Any]
    embeddings: Float[Tensor, "expert width"]
    means: Float[Tensor, "expert size"]
    variances: Float[Tensor, "expert size"]  # over checkpoints, of the population (our choice)
    samples: tuple[Float[Tensor, "checkpoint size"], ...]  # what the generator learns; empty when read from a file
    start: str = ""  # the experts'; empty where it is unknown or they were brought to one form


@dataclass(frozen=True)
class Condition:
    """Mean and variance of the parameters that a description suggests, and the experts' weights in them."""

    mean: Float[Tensor, " size"]
    variance: Float[Tensor, " size"]
    weights: Float[Tensor, " expert"]  # >= 0, sum 1, at most K are not 0
    similarity: float  # cosine of the nearest expert


def build_library(experts: Sequence[TaskExpert], encode: Callable[[str], Tensor], *, canonicalize: bool = False) -> ExpertLibrary:
    """Flatten the experts and embed their descriptions.

    Args:
        encode: Text to a vector, such as a frozen CLIP text encoder; called once per expert, without gradients.
        canonicalize: Bring every module's factors to ``B = U sqrt(S)``, ``A = sqrt(S) V^T`` with fixed signs. Needed for experts
            that did not share a start: (B Q, Q^-1 A) is the same adapter for every Q, so their averages would mean nothing.
    Raises: ValueError for no experts, an empty description, NaN, infinity or a negative variance, tensors other than LoRA factors,
        or experts that differ in names, shapes, config or (without ``canonicalize``) start, or embeddings that are not vectors of
        one size, or given variances of factors that are to be canonicalized.
    """
    if not experts:
        raise ValueError("build_library.experts must not be empty, got 0 experts.")
    first = experts[0]
    if not first.checkpoints:
        raise ValueError(f"build_library.experts must have checkpoints, got none in {first.name}.")
    schema = LoraSchema.of(first.checkpoints[0])
    embeddings, samples, variances = [], [], []
    for expert in experts:
        if not expert.description.strip():
            raise ValueError(f"build_library.experts must be described, got an empty description of {expert.name}.")
        if dict(expert.config) != dict(first.config):
            raise ValueError(f"build_library.experts must share rank, alpha and targets, got {expert.name} unlike {first.name}.")
        if expert.start != first.start and not canonicalize:
            raise ValueError(
                f"build_library.experts must share their start, got {expert.name} unlike {first.name}. "
                "Train them from one seed, or pass canonicalize=True."
            )
        if not expert.checkpoints:
            raise ValueError(f"build_library.experts must have checkpoints, got none in {expert.name}.")
        if any(LoraSchema.of(state) != schema for state in expert.checkpoints):
            raise ValueError(f"build_library.experts must have the same tensors, got {expert.name} unlike {first.name}.")
        states = [canonical(state) if canonicalize else state for state in expert.checkpoints]
        sample = torch.stack([schema.flatten(state) for state in states])
        if not sample.isfinite().all():
            raise ValueError(f"build_library.experts must be finite, got NaN or infinity in {expert.name}.")
        if len(sample) < 2 and expert.variances is None:
            warnings.warn(f"{expert.name} has one checkpoint, so its variance is taken as 0.", stacklevel=2)
        samples.append(sample)
        variances.append(sample.var(0, correction=0) if expert.variances is None else _given(expert, schema, canonicalize))
        embeddings.append(embed(encode, expert.description))
    if len({embedding.shape for embedding in embeddings}) > 1:
        raise ValueError("build_library.encode must give vectors of one size, got several.")
    return ExpertLibrary(
        schema,
        tuple(expert.name for expert in experts),
        dict(first.config),
        torch.stack(embeddings),
        torch.stack([sample.mean(0) for sample in samples]),
        torch.stack(variances),
        tuple(samples),
        "" if canonicalize else first.start,
    )


def _given(expert: TaskExpert, schema: LoraSchema, canonicalize: bool) -> Float[Tensor, " size"]:
    assert expert.variances is not None
    owner = f"build_library.experts: the variances of {expert.name}"
    if canonicalize:
        raise ValueError(f"{owner} must not be given with canonicalize=True, which changes the factors. Give more checkpoints.")
    if LoraSchema.of(expert.variances).shapes != schema.shapes:
        raise ValueError(f"{owner} must have the tensors of its checkpoints, got others. Give one for each parameter.")
    found = schema.flatten(expert.variances)
    if not (found >= 0).all() or not found.isfinite().all():
        raise ValueError(f"{owner} must be finite and not negative, got {found.min().item():g} at least.")
    return found


@torch.no_grad()
def embed(encode: Callable[[str], Tensor], description: str) -> Float[Tensor, " width"]:
    """``encode(description)`` on the CPU, float32 at least.

    Raises: ValueError if the description is empty or the result no finite vector other than 0.
    """
    if not description.strip():
        raise ValueError("embed.description must not be empty. Say in a few words what the task is.")
    vector = _wide(encode(description))
    if vector.ndim != 1 or not vector.isfinite().all() or not vector.any():
        raise ValueError(f"embed.encode must give a finite vector other than 0, got a tensor of shape {tuple(vector.shape)}.")
    return vector


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.promote_types(tensor.dtype, torch.float32))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a LoRA's factors, hex: `TaskExpert.start`, when taken before the first step."""
    schema = LoraSchema.of(state)
    return hash_value([schema, schema.flatten(state).tolist()])


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same products ``B A`` with balanced orthogonal factors; the largest entry of each column of B is positive."""
    result = {}
    for name in state:
        if name.endswith(DOWN):
            up_name = name.removesuffix(DOWN) + UP
            down, up = _wide(state[name]), _wide(state[up_name])
            u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
            u, root, vh = u[:, : len(down)], s[: len(down)].sqrt(), vh[: len(down)]
            sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
            new_up, new_down = u * root * sign, vh * (root[:, None] * sign.T)
            missing = len(down) - len(root)  # a rank above the smaller side: the rest is 0
            result[name] = F.pad(new_down, (0, 0, 0, missing)).to(state[name].dtype)
            result[up_name] = F.pad(new_up, (0, missing)).to(state[up_name].dtype)
    return result


def aggregate(
    library: ExpertLibrary,
    embedding: Float[Tensor, " width"],
    *,
    top_k: int = 4,
    tau: float = 0.05,
    leave_out: int | None = None,
    floor: float = 0.2,
) -> Condition:
    """Softmax-weighted mean and total variance of the K experts nearest to ``embedding``.

    ``mean = sum_k a_k mu_k``, ``variance = sum_k a_k sigma_k^2 + sum_k a_k (mu_k - mean)^2``, ``a = softmax(cosine / tau)`` over K.

    Args:
        top_k: K, 1 or more; the paper's 4. Fewer experts than that are all used, with a warning.
        tau: Temperature on cosines, > 0; 0.05 is our choice.
        leave_out: An expert that does not count, as for making training pairs.
        floor: Best cosine below which a warning says that no expert is related; quality falls sharply there.
    Raises: ValueError for options out of range, an embedding of another size, or no expert left.
    """
    check_range("aggregate.top_k", top_k, low=1)
    check_range("aggregate.tau", tau, above=0.0)
    if embedding.shape != library.embeddings.shape[1:]:
        raise ValueError(
            f"aggregate.embedding must have {library.embeddings.shape[1]} numbers as the library's, got {tuple(embedding.shape)}."
        )
    cosines = F.cosine_similarity(library.embeddings, embedding[None], dim=1)
    others = [e for e in range(len(library.names)) if e != leave_out]
    if not others:
        raise ValueError("aggregate.library must have an expert besides the one left out, got none.")
    if top_k > len(others):
        warnings.warn(f"aggregate.top_k is {top_k}, but only {len(others)} experts are there: all are used.", stacklevel=2)
    near = torch.tensor(others)[cosines[others].topk(min(top_k, len(others))).indices]
    best = cosines[near].max().item()
    if best < floor:
        warnings.warn(f"No related expert: the nearest, {library.names[int(near[0])]}, has cosine {best:.2f}.", stacklevel=2)
    weights = torch.zeros_like(cosines)
    weights[near] = (cosines[near] / tau).softmax(0)
    share = weights[near][:, None]
    mean = (share * library.means[near]).sum(0)
    variance = (share * (library.variances[near] + (library.means[near] - mean).square())).sum(0)
    return Condition(mean, variance, weights, best)
