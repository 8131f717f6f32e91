"""From cached latents and named draws to the tensors of a step. Winners come first, losers second, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.data.images.latents import EMPTY_PROMPT_ROW, LatentCache, PairLatents
from valign.interfaces import PairCache
from valign.models.diffusion.base import Conditioning, DiffusionModel
from valign.objectives import min_snr_weight
from valign.randomness import generator_for
from valign.training.engine.draws import PairDraw, draw_pair
from valign.training.tasks.preference.config import PreferenceConfig

RETAIN_EMPTY = 0.1  # share of empty captions among the retained ones


@dataclass(frozen=True)
class Images:
    """What one forward pass of the U-Net takes, and what it should answer."""

    noisy: Float[Tensor, "image channel height width"]
    target: Float[Tensor, "image channel height width"]
    timesteps: Int[Tensor, " image"]
    conditioning: Conditioning


@dataclass(frozen=True)
class PairBatch:
    """Pairs with all their random draws. Timestep, noise and caption of a winner and its loser are equal."""

    ids: tuple[str, ...]
    timesteps: Int[Tensor, " pair"]
    noisy: Float[Tensor, "image channel height width"]  # image = 2 pair
    target: Float[Tensor, "image channel height width"]
    conditioning: Conditioning  # one row per pair
    weight: Float[Tensor, " pair"]  # on all four errors; 1 without min-SNR

    def pieces(self, *, split: bool) -> list[Images]:
        """The forward passes: both halves at once, or winners and losers one after the other."""
        if not split:
            return [Images(self.noisy, self.target, self.timesteps.repeat(2), self.conditioning.repeat(2))]
        halves = zip(self.noisy.chunk(2), self.target.chunk(2), strict=True)
        return [Images(noisy, target, self.timesteps, self.conditioning) for noisy, target in halves]


class PairSource:
    """Makes batches out of some rows of a latent cache; a pair is named by its place in ``rows``."""

    def __init__(self, model: DiffusionModel, cache: LatentCache, rows: Int[Tensor, " row"], config: PreferenceConfig) -> None:
        self.model, self.cache, self.rows, self.config = model, cache, rows, config
        self.dtype = model.dtype  # of the frozen weights: read before factors in float32 are handle

    def __len__(self) -> int:
        return len(self.rows)

    def visit(self, visits: Sequence[tuple[int, int]], *, safe_caption: bool = False) -> PairBatch:
        """The training draws of ``(pair, visit)``; under the unsafe caption, or under the paired safe one with draws of its own."""
        fixed, config = self.config.precompute_ref_draws, self.config
        draws = [
            draw_pair(
                generator_for("safe" if safe_caption else "unsafe", config.seed, self._id(pair), visit % fixed if fixed else visit),
                self.cache.latent_shape,
                num_timesteps=self.model.schedule.num_timesteps,
                empty_prompt_prob=0.0 if safe_caption else config.empty_prompt_prob,
                flip_prob=0.5 if config.flip else 0.0,
            )
            for pair, visit in visits
        ]
        return self._build([pair for pair, _ in visits], draws, safe_caption)

    def retained(self, visits: Sequence[tuple[int, int]]) -> Images:
        """The winners of ``(pair, visit)`` under benign captions drawn from ``cache.retained_rows``, with draws of their own.

        One caption in ten is the empty one: it is the other half of guidance.
        """
        made = [generator_for("retained", self.config.seed, self._id(pair), visit) for pair, visit in visits]
        draws = [
            draw_pair(
                generator, self.cache.latent_shape, num_timesteps=self.model.schedule.num_timesteps, empty_prompt_prob=RETAIN_EMPTY
            )
            for generator in made
        ]
        known = self.cache.retained_rows
        captions = torch.stack([known[torch.randint(len(known), (), generator=generator)] for generator in made])
        return self._assemble([pair for pair, _ in visits], draws, captions).pieces(split=True)[0]

    def validation(self, places: Sequence[tuple[int, int]], draws: int, *, safe_caption: bool = False) -> PairBatch:
        """Fixed draws of ``(pair, k)``, k < ``draws``, one from each equal part of the schedule; no drop, no flip."""
        made = [
            draw_pair(
                generator_for("validation", self.config.seed, self._id(pair), k),
                self.cache.latent_shape,
                num_timesteps=self.model.schedule.num_timesteps,
                stratum=(k, draws),
            )
            for pair, k in places
        ]
        return self._build([pair for pair, _ in places], made, safe_caption)

    def _id(self, pair: int) -> str:
        return self.cache.ids[int(self.rows[pair])]

    def _build(self, pairs: list[int], draws: list[PairDraw], safe_caption: bool) -> PairBatch:
        captions = (self.cache.safe_text_rows if safe_caption else self.cache.text_rows)[self.rows[torch.tensor(pairs)]]
        return self._assemble(pairs, draws, captions)

    def _assemble(self, pairs: list[int], draws: list[PairDraw], captions: Int[Tensor, " pair"]) -> PairBatch:
        device = self.model.device
        rows = self.rows[torch.tensor(pairs)]
        captions = captions.masked_fill(torch.tensor([draw.drop_caption for draw in draws]), EMPTY_PROMPT_ROW)
        cached = self.cache.batch(rows, torch.tensor([draw.flip for draw in draws]))
        conditioning = Conditioning(**self.cache.conditioning(captions)).to(device, self.dtype)
        return self._noised(pairs, draws, cached, conditioning)

    def _noised(self, pairs: list[int], draws: list[PairDraw], cached: PairLatents, conditioning: Conditioning) -> PairBatch:
        model, device = self.model, self.model.device
        winners = cached.winner_mean + cached.winner_std * torch.stack([draw.winner_noise for draw in draws])
        losers = cached.loser_mean + cached.loser_std * torch.stack([draw.loser_noise for draw in draws])
        latents = torch.cat([winners, losers]).to(device)
        noise = torch.stack([draw.noise for draw in draws]).repeat(2, 1, 1, 1).to(device)
        timesteps = torch.tensor([draw.timestep for draw in draws], device=device)
        return PairBatch(
            ids=tuple(map(self._id, pairs)),
            timesteps=timesteps,
            noisy=model.schedule.add_noise(latents, noise, timesteps.repeat(2)),
            target=model.schedule.target(latents, noise, timesteps.repeat(2)),
            conditioning=conditioning,
            weight=self._weight(timesteps),
        )

    def _weight(self, timesteps: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        if self.config.min_snr is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        kept = self.model.schedule.alpha_bar(timesteps)
        return min_snr_weight(kept / (1 - kept), prediction=self.model.schedule.kind, gamma=self.config.min_snr)


def split_rows(cache: PairCache, rows: Int[Tensor, " row"], fraction: float) -> tuple[Int[Tensor, " train"], Int[Tensor, " held"]]:
    """``(training, validation)``: the pairs whose ids have the smallest hashes are held out, whatever the seed.

    Both keep the order of ``rows``. At least one pair is held out if ``fraction`` > 0 and there are two or more.
    """
    count = 0 if fraction == 0 or len(rows) < 2 else max(1, round(fraction * len(rows)))
    hashes = torch.tensor([generator_for("held out", cache.ids[int(row)]).initial_seed() for row in rows])
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    held_out[hashes.argsort(stable=True)[:count]] = True
    return rows[~held_out], rows[held_out]
