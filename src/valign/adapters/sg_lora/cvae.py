"""The conditional variational autoencoder of SG-LoRA, whose prior depends on the condition."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

LOG_VARIANCE = 10.0  # the networks' log-variances are clamped to +- this (our choice)
LAYER_WIDTH = 16  # of the vector that tells layers apart (our choice)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normals."""

    mean: Float[Tensor, "*batch latent"]
    log_variance: Float[Tensor, "*batch latent"]

    def sample(self, generator: torch.Generator) -> Float[Tensor, "*batch latent"]:
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + (0.5 * self.log_variance).exp() * noise


def kl_divergence(q: DiagonalGaussian, p: DiagonalGaussian) -> Float[Tensor, " *batch"]:
    """``0.5 sum_i [log(p_i^2 / q_i^2) + (q_i^2 + (mu_q - mu_p)^2) / p_i^2 - 1]``, >= 0, in nats."""
    gap = (q.log_variance.exp() + (q.mean - p.mean).square()) / p.log_variance.exp()
    return 0.5 * (p.log_variance - q.log_variance + gap - 1).sum(-1)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SemanticCvae(nn.Module):
    """Encoder q(z | x, c) and prior p(z | c) of two layers, decoder g(z, c) of three, on standardized vectors.

    Args:
        size: P, numbers in x; the condition has 2 P.
        latent, hidden: Widths, each 1 or more.
        layers: Above 1, x and condition have a row for each layer, in the dimension before the last; all share the networks, which
            are told the layer by a learnt vector.
    """

    def __init__(self, size: int, latent: int = 64, hidden: int = 512, layers: int = 1) -> None:
        super().__init__()
        self.layer = nn.Embedding(layers, LAYER_WIDTH) if layers > 1 else None
        given = 2 * size + (LAYER_WIDTH if layers > 1 else 0)
        self.encoder = mlp(size + given, hidden, 2 * latent)
        self.prior = mlp(given, hidden, 2 * latent)
        self.decoder = mlp(latent + given, hidden, hidden, size)

    def encode(self, x: Float[Tensor, "*batch size"], condition: Float[Tensor, "*batch width"]) -> DiagonalGaussian:
        return _gaussian(self.encoder(torch.cat([x, self._placed(condition)], dim=-1)))

    def prior_of(self, condition: Float[Tensor, "*batch width"]) -> DiagonalGaussian:
        return _gaussian(self.prior(self._placed(condition)))

    def decode(self, z: Float[Tensor, "*batch latent"], condition: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch size"]:
        x: Tensor = self.decoder(torch.cat([z, self._placed(condition)], dim=-1))
        return x

    def loss(
        self,
        x: Float[Tensor, "*batch size"],
        condition: Float[Tensor, "*batch width"],
        generator: torch.Generator,
        kl_weight: float = 1.0,
        counted: Tensor | None = None,
    ) -> Float[Tensor, " *batch"]:
        """Squared error, summed over (``counted``) parameters, plus ``kl_weight`` times the divergence of q from the prior."""
        q, p = self.encode(x, condition), self.prior_of(condition)
        error = (x - self.decode(q.sample(generator), condition)).square()
        return (error if counted is None else error * counted).sum(-1) + kl_weight * kl_divergence(q, p)

    def _placed(self, condition: Tensor) -> Tensor:
        """The condition, and which layer it is of."""
        if self.layer is None:
            return condition
        return torch.cat([condition, self.layer.weight.expand(*condition.shape[:-1], LAYER_WIDTH)], dim=-1)


def _gaussian(numbers: Tensor) -> DiagonalGaussian:
    mean, log_variance = numbers.chunk(2, dim=-1)
    return DiagonalGaussian(mean, log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE))
