"""SG-LoRA: LoRA weights for a new task from its description (Li et al., arXiv 2509.10535)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor

from valign.adapters.sg_lora.chunks import Chunk, Chunks
from valign.adapters.sg_lora.cvae import SemanticCvae
from valign.adapters.sg_lora.library import Condition, ExpertLibrary, LoraSchema, aggregate, embed
from valign.checks import check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="sg-lora",
    title="SG-LoRA: LoRA weights from a task's description and a library of experts",
    paper="arXiv 2509.10535",
    room="adapters",
    entry="valign.adapters.sg_lora.generation:fit_sg_lora",
    fidelity="variant",
    note="the paper leaves widths, temperature and training open and its code is not public: these are ours",
)

Mode = Literal["sample", "mean", "merge"]
STD_FLOOR = 1e-6
LOG_FLOOR = 1e-8  # of variances, before the logarithm


@dataclass(frozen=True, kw_only=True)
class SgLoraConfig:
    """How the generator is trained. K and the KL weight are the paper's; the rest it does not say, so these are our choices.

    Raises: ValueError for a value out of range.
    """

    top_k: int = 4  # experts per condition
    tau: float = 0.05  # temperature of their softmax, on cosines, > 0
    kl_weight: float = 1.0  # lambda, >= 0
    latent: int = 64
    hidden: int = 512
    chunk: Chunk = "none"  # "layer": small networks that all adapted layers share, for many parameters
    learning_rate: float = 1e-3  # of Adam
    steps: int = 2000
    batch: int = 64  # pairs per step, drawn with replacement
    seed: int = 0  # of the networks' start, the batches and the noise

    def __post_init__(self) -> None:
        for name in ("top_k", "latent", "hidden", "steps", "batch"):
            check_range(f"SgLoraConfig.{name}", getattr(self, name), low=1)
        for name in ("tau", "learning_rate"):
            check_range(f"SgLoraConfig.{name}", getattr(self, name), above=0.0)
        check_range("SgLoraConfig.kl_weight", self.kl_weight, low=0.0)
        check_range("SgLoraConfig.seed", self.seed, low=0)
        check_choice("SgLoraConfig.chunk", self.chunk, ("none", "layer"))

    def network(self, schema: LoraSchema) -> SemanticCvae:
        """A new one, drawn from the global generator."""
        layers, width = Chunks.of(schema, self.chunk).places.shape
        return SemanticCvae(width, self.latent, self.hidden, layers)


@dataclass(frozen=True)
class Scales:
    """Per coordinate: mean and standard deviation of the experts' parameters, and of the logarithms of their variances."""

    mean: Float[Tensor, " size"]
    std: Float[Tensor, " size"]
    log_mean: Float[Tensor, " size"]
    log_std: Float[Tensor, " size"]

    @classmethod
    def of(cls, library: ExpertLibrary) -> "Scales":
        samples, logs = torch.cat(library.samples), (library.variances + LOG_FLOOR).log()
        spread = [values.std(0, correction=0).clamp(min=STD_FLOOR) for values in (samples, logs)]
        return cls(samples.mean(0), spread[0], logs.mean(0), spread[1])

    def condition(self, condition: Condition, chunks: Chunks) -> Float[Tensor, "chunk width"]:
        """Standardized mean and log-variance side by side, 2 P numbers; far variances are held at 10 standard deviations."""
        logs = ((condition.variance + LOG_FLOOR).log() - self.log_mean) / self.log_std
        parts = ((condition.mean - self.mean) / self.std, logs.clamp(-10, 10))
        return torch.cat([chunks.split(part) for part in parts], dim=1).float()


@dataclass(frozen=True)
class SgLora:
    """A trained generator. What it makes is untested: measure it before use."""

    library: ExpertLibrary
    network: SemanticCvae
    scales: Scales
    config: SgLoraConfig
    losses: tuple[float, ...]  # mean over the batch, by step

    def lora_config(self) -> LoraConfig:
        """peft's config for the generated weights: the experts'."""
        return LoraConfig(**self.library.config)

    def condition(self, encode: Callable[[str], Tensor], description: str) -> Condition:
        """The experts' weights, mean and variance for a description."""
        return aggregate(self.library, embed(encode, description), top_k=self.config.top_k, tau=self.config.tau)

    @torch.no_grad()
    def generate(
        self, encode: Callable[[str], Tensor], description: str, *, mode: Mode = "sample", seed: int = 0
    ) -> dict[str, Tensor]:
        """A state dict for `peft.set_peft_model_state_dict`, with the names, shapes and dtype of the experts.

        Args:
            mode: ``"sample"`` draws from the prior with ``seed``; ``"mean"`` takes the prior's mean; ``"merge"`` is the weighted
                mean of the nearest experts without the network, the safe fallback.
        """
        check_choice("SgLora.generate.mode", mode, ("sample", "mean", "merge"))
        condition = self.condition(encode, description)
        if mode == "merge":
            return self.library.schema.unflatten(condition.mean)
        chunks = Chunks.of(self.library.schema, self.config.chunk)
        rows = self.scales.condition(condition, chunks)
        prior = self.network.prior_of(rows)
        z = prior.mean if mode == "mean" else prior.sample(torch.Generator().manual_seed(seed))
        return self.library.schema.unflatten(chunks.join(self.network.decode(z, rows)) * self.scales.std + self.scales.mean)


def fit_sg_lora(library: ExpertLibrary, config: SgLoraConfig | None = None) -> SgLora:
    """Train on every checkpoint of every expert, each under the condition that the *other* experts give its description.

    Leaving the expert out is our reading, and needed: with itself in the library its weight is nearly 1, and a copy is learnt.

    Raises: ValueError for fewer than two experts, or a library without samples.
    """
    config = SgLoraConfig() if config is None else config
    check_range("fit_sg_lora.library", len(library.names), low=2, hint="One expert has no other to be described by.")
    if len(library.samples) != len(library.names):
        raise ValueError("fit_sg_lora.library must have its samples, got those of a loaded generator. Build it from the experts.")
    scales, chunks = Scales.of(library), Chunks.of(library.schema, config.chunk)
    count = len(library.names)
    others = {"top_k": min(config.top_k, count - 1), "tau": config.tau}
    rows = [aggregate(library, library.embeddings[e], **others, leave_out=e) for e in range(count)]  # type: ignore[arg-type]
    conditions = torch.stack([scales.condition(row, chunks) for row in rows])
    owners = torch.repeat_interleave(torch.arange(count), torch.tensor([len(s) for s in library.samples]))
    samples = ((torch.cat(library.samples) - scales.mean) / scales.std).float()
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which is put back afterwards
        torch.manual_seed(config.seed)
        network = config.network(library.schema)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    losses = []
    for _ in range(config.steps):
        pick = torch.randint(len(samples), (min(config.batch, len(samples)),), generator=generator)
        optimizer.zero_grad()
        picked = chunks.split(samples[pick])
        loss = network.loss(picked, conditions[owners[pick]], generator, config.kl_weight, chunks.counted).sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return SgLora(library, network.requires_grad_(False).eval(), scales, config, tuple(losses))
