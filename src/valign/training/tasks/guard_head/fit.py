"""Train the head: any harm and each category, paired prompts as contrasts, optionally with upper encoder layers.

Loss per row: binary cross-entropy of column "any"; of the categories where they are known (a category that an unsafe row does not
name counts half, since sets name one of several). An unsafe row counts by its certainty: sets that were made from images call
prompts unsafe that most judges do not. Per pair of prompts: ``relu(margin - (any_unsafe - any_safe))`` on the logits.
And `naming_loss`: which category an unsafe row has, given that it has one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import binary_cross_entropy_with_logits

from valign.checks import UserError, check_options, check_range, option
from valign.data.prompts.pairs import LabelledPrompt
from valign.models.devices import cpu_has
from valign.models.encoders.minilm import LAYERS, WIDTH, MiniLM, Tokens, run_layers
from valign.models.heads.ngrams import ngram_ids
from valign.models.heads.prompt_head import ATTEND, Head, HeadSettings, head_logits, sentence_vectors
from valign.policy import Policy
from valign.progress import track
from valign.text import clean
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule, keep_peaks
from valign.training.engine.task import LoopConfig, TrainingTask

TRAIN_TOKENS = 64  # of a text that training looks at; use looks at all
NEIGHBOURHOOD = 20  # batches within which texts are sorted by length
INPUT_SCALE, QUERY_SCALE = 0.2, 0.02  # of first weights; a query begins as nearly the plain mean
OTHER_CATEGORY = 0.5  # weight of the categories that an unsafe row does not name


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that shapes a fit; stored in the head's notes."""

    epochs: int = option(6, help="passes over the data", low=1)
    batch_size: int = option(64, help="prompts per step; paired prompts stay together", low=1)
    lr: float = option(
        3e-3, help="learning rate of the head and the n-grams; AdamW, linear warm-up over 5 % and decay to 0", above=0, rare=True
    )
    encoder_lr: float = option(1e-4, help="learning rate of tuned encoder layers", above=0, rare=True, needs={"tuned_layers": ()})
    weight_decay: float = option(0.01, help="weight decay of AdamW", rare=True)
    tuned_layers: int = option(
        0, help="upper encoder layers trained with the head; 0 is quick", low=0, high=LAYERS, flags=("--tune-layers",)
    )
    buckets: int = option(16384, help="size of the n-gram hash", rare=True)
    bag_dim: int = option(48, help="width of the n-gram vectors", low=1, rare=True)
    hidden: int = option(256, help="hidden units", low=1, rare=True)
    queries: int = option(
        2,
        help="means of tokens that the head weighs itself, beside the plain one; none on a frozen encoder",
        low=0,
        rare=True,
        needs={"tuned_layers": ()},
    )
    dropout: float = option(0.3, help="of the hidden units", low=0, high=0.9, rare=True)
    margin: float = option(3.0, help="logits between paired prompts", rare=True, needs={"margin_weight": ()})
    margin_weight: float = option(0.3, help="weight of that margin in the loss", rare=True)
    naming_weight: float = option(
        0.3, help="weight in the loss of which category an unsafe prompt has, beside whether it has each", low=0, rare=True
    )
    weights: Mapping[str, float] = option(
        dict, help="on what a source's rows count, and on --limit, as for real traffic", flags=("--weigh",)
    )
    fragments: float = option(0.05, help="harmless pieces of one to three words to add per harmless prompt", low=0, high=1)
    generated: int = option(
        12, help="paired prompts per harm of the built-in grammar to add, and 125 times as many requests; 0 adds none", low=0
    )
    seed: int = option(0, help="random seed of the fit")

    def __post_init__(self) -> None:
        check_options(self)
        for source, factor in self.weights.items():
            check_range(f"FitConfig.weights[{source}]", factor, above=0.0)


def hidden_words(policy: Policy) -> tuple[str, ...]:
    """Words of the block rules' first lists: rules decide about them, so nothing may be learnt from them."""
    return tuple(sorted({word for rule in policy.always_block for word in rule.every[0]}))


def targets(
    rows: Sequence[LabelledPrompt], categories: Sequence[str]
) -> tuple[Float[Tensor, "row column"], Float[Tensor, "row column"]]:
    """Targets and weights, 0 where nothing is known."""
    goal = torch.zeros(len(rows), 1 + len(categories))
    weight = torch.ones_like(goal)
    for i, row in enumerate(rows):
        goal[i, 0] = row.label
        if row.label:
            named = torch.tensor([name in row.categories for name in categories])
            goal[i, 1:] = named.float()
            weight[i, 1:] = torch.where(named, 1.0, OTHER_CATEGORY) if row.categories else 0.0
    return goal, weight


def source_weights(rows: Sequence[LabelledPrompt], factors: Mapping[str, float] = MappingProxyType({})) -> Float[Tensor, " row"]:
    """Rows of a source and label weigh ``factor / sqrt(their number)``, unsafe ones times their certainty, and both labels the same
    in total; the mean is 1."""
    counts = Counter((row.source, row.label) for row in rows)
    sure = [row.certainty if row.label else 1.0 for row in rows]
    weight = torch.tensor(
        [factors.get(row.source, 1.0) * one * counts[row.source, row.label] ** -0.5 for row, one in zip(rows, sure)]
    )
    label = torch.tensor([row.label for row in rows])
    for one in (0, 1):
        weight[label == one] /= weight[label == one].sum().clamp(min=1e-12)
    return weight / weight.mean()


def batches(rows: Sequence[LabelledPrompt], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Indices of one epoch, about ``size`` at a time, paired prompts together; a batch has texts of like length, to save padding.

    Units are shuffled, then sorted by length within `NEIGHBOURHOOD` batches, and the batches are shuffled again.
    """
    units: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        units.setdefault(row.pair or row.id, []).append(i)
    groups = list(units.values())
    order = torch.randperm(len(groups), generator=generator).tolist()
    found: list[list[int]] = []
    for first in range(0, len(order), NEIGHBOURHOOD * size):
        near = [groups[number] for number in order[first : first + NEIGHBOURHOOD * size]]
        batch: list[int] = []
        for unit in sorted(near, key=lambda unit: len(rows[unit[0]].prompt)):
            batch += unit
            if len(batch) >= size:
                found.append(batch)
                batch = []
        if batch:
            found.append(batch)
    yield from (found[number] for number in torch.randperm(len(found), generator=generator).tolist())


def contrast_loss(any_logits: Float[Tensor, " row"], rows: Sequence[LabelledPrompt], margin: float) -> Tensor:
    """Mean hinge over the pairs whose two sides are among the rows; 0 without any."""
    sides: dict[str, list[list[int]]] = {}
    for i, row in enumerate(rows):
        if row.pair:
            sides.setdefault(row.pair, [[], []])[row.label].append(i)
    pairs = [(unsafe, safe) for safe_side, unsafe_side in sides.values() for unsafe in unsafe_side for safe in safe_side]
    if not pairs:
        return any_logits.new_zeros(())
    unsafe, safe = (torch.tensor(side) for side in zip(*pairs))
    return (margin - (any_logits[unsafe] - any_logits[safe])).relu().mean()


def naming_loss(
    logits: Float[Tensor, "row category"], named: Float[Tensor, "row category"], weight: Float[Tensor, " row"]
) -> Tensor:
    """Weighted mean of ``-log softmax`` of the categories that a row names, over all rows; rows that name none add nothing.

    Whether a prompt is harmful is left to the other columns: this asks only which category exceeds the others.
    """
    chosen = named.any(dim=1)
    if not bool(chosen.any()):
        return logits.new_zeros(())
    shares = logits[chosen].log_softmax(dim=1).masked_fill(named[chosen] == 0, -inf).logsumexp(dim=1)
    return -(weight[chosen] * shares).sum() / len(logits)


def fit_head(
    rows: Sequence[LabelledPrompt], policy: Policy, encoder: MiniLM, config: FitConfig = FitConfig(), *, start: Head | None = None
) -> Head:
    """A head without thresholds; the module `calibration` sets them. Same rows, config and machine: same weights.

    Args: start: A head of the same shape that is trained further; None starts from the encoder and chance.
    Raises: UserError unless there are safe and unsafe rows, or if ``start`` has another shape.
    """
    if len({row.label for row in rows}) < 2:
        raise UserError("fit_head.rows must be safe and unsafe prompts, got one kind. Add rows of the other label.")
    settings = HeadSettings(
        categories=policy.category_ids(),
        encoder_sha256=encoder.sha256,
        buckets=config.buckets,
        tuned_layers=config.tuned_layers,
        hidden_words=hidden_words(policy),
    )
    texts = [settings.neutral(clean(row.prompt)) for row in rows]
    task = HeadTask(rows, texts, settings, encoder, config, start)
    TrainingLoop(task, start_processes(cpu=True)).run()
    return Head(settings, {name: tensor.detach() for name, tensor in task.weights.items()})


class HeadTask(TrainingTask):
    """The weights of one head; its draws come from one generator in order, so a fit does not resume."""

    max_norm = 1.0

    def __init__(
        self,
        rows: Sequence[LabelledPrompt],
        texts: Sequence[str],
        settings: HeadSettings,
        encoder: MiniLM,
        config: FitConfig,
        start: Head | None,
    ) -> None:
        self.rows, self.texts, self.encoder, self.config = rows, texts, encoder, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.weights = _first_weights(settings, encoder, config, self.generator)
        if start is not None:
            self.weights = _taken_over(self.weights, start, settings)
        self.grams = [ngram_ids(text, config.buckets) for text in texts]
        self.goal, self.column_weight = targets(rows, settings.categories)
        self.row_weight = source_weights(rows, config.weights)
        self.vectors = None if config.tuned_layers else torch.from_numpy(_first_windows(encoder, texts))

        upper = [tensor for name, tensor in self.weights.items() if name.startswith("upper.")]
        small = [tensor for name, tensor in self.weights.items() if not name.startswith("upper.")]
        groups = [{"params": small, "lr": config.lr}, {"params": upper, "lr": config.encoder_lr}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=config.weight_decay, fused=True
        )
        keep_peaks(self.optimizer)
        self.plan = [batch for _ in range(config.epochs) for batch in batches(rows, config.batch_size, self.generator)]
        self.schedule = Schedule(steps=len(self.plan), warmup=max(1, len(self.plan) // 20), decay="linear")
        self.loop = LoopConfig(steps=len(self.plan), label="fit the head")
        for tensor in self.weights.values():
            tensor.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        return list(self.weights.values())

    def tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    def gradients(self, step: int) -> dict[str, float]:
        loss = self._loss(self.plan[step])
        loss.backward()
        return {"loss": float(loss.detach())}

    def _loss(self, batch: list[int]) -> Tensor:
        rows = [self.rows[i] for i in batch]
        grams = [self.grams[i] for i in batch]
        starts = torch.tensor([0, *map(len, grams)][:-1]).cumsum(0)
        vectors = self._vectors(batch)
        logits = head_logits(
            _dropped(self.weights, self.config.dropout, self.generator),
            vectors,
            torch.tensor([i for row in grams for i in row]),
            starts,
        )
        each = binary_cross_entropy_with_logits(logits, self.goal[batch], weight=self.column_weight[batch], reduction="none")
        loss = (self.row_weight[batch] * (each[:, 0] + each[:, 1:].mean(1))).mean()
        loss = loss + self.config.naming_weight * naming_loss(logits[:, 1:], self.goal[batch][:, 1:], self.row_weight[batch])
        return loss + self.config.margin_weight * contrast_loss(logits[:, 0], rows, self.config.margin)

    def _vectors(self, batch: list[int]) -> Float[Tensor, "row dim"]:
        if self.vectors is not None:
            return self.vectors[batch]
        tokens = _first_window(self.encoder.tokenize([self.texts[i] for i in batch]))
        first = LAYERS - self.config.tuned_layers
        own = {name.removeprefix("upper."): tensor for name, tensor in self.weights.items() if name.startswith("upper.")}
        # bfloat16 of the products only is twice as fast where the processor has it (twenty times slower where not); so is
        # attention without the fused kernel, whose backward pass takes longer on short texts than all else together.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has("amx_bf16", "avx512_bf16")), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                lower = self.encoder.lower(tokens, first)
            hidden = run_layers(lower, tokens.mask, own, range(first, LAYERS))
        return sentence_vectors(hidden.float(), tokens.mask, self.weights)


def _first_weights(settings: HeadSettings, encoder: MiniLM, config: FitConfig, generator: torch.Generator) -> dict[str, Tensor]:
    queries = config.queries if config.tuned_layers else 0
    columns, width = len(settings.columns), WIDTH * (1 + queries) + config.bag_dim

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "ngrams.weight": normal(config.buckets, config.bag_dim, scale=0.1),
        "hidden.weight": normal(config.hidden, width, scale=INPUT_SCALE),  # vectors of unit length have small entries
        "hidden.bias": torch.zeros(config.hidden),
        "out.weight": normal(columns, config.hidden, scale=config.hidden**-0.5),
        "out.bias": torch.zeros(columns),
    }
    if queries:
        weights[ATTEND] = normal(queries, WIDTH, scale=QUERY_SCALE)
    for layer in range(LAYERS - config.tuned_layers, LAYERS):
        own = {name: tensor for name, tensor in encoder.weights.items() if name.startswith(f"encoder.layer.{layer}.")}
        weights |= {f"upper.{name}": tensor.clone() for name, tensor in own.items()}
    return weights


def _taken_over(fresh: dict[str, Tensor], start: Head, settings: HeadSettings) -> dict[str, Tensor]:
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (fresh, start.weights)]
    old = start.settings
    same = (old.encoder_sha256, old.columns, old.hidden_words) == (settings.encoder_sha256, settings.columns, settings.hidden_words)
    if shapes[0] != shapes[1] or not same:
        raise UserError("fit_head.start must have the fit's encoder, policy and sizes, got others. Give the settings that it had.")
    return {name: start.weights[name].clone() for name in fresh}


def _dropped(weights: dict[str, Tensor], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Hidden units dropped for a whole batch, by their outgoing weights."""
    kept = torch.rand(weights["out.weight"].shape[1], generator=generator) >= share
    return weights | {"out.weight": weights["out.weight"] * kept / (1 - share)}


def _first_window(tokens: Tokens) -> Tokens:
    """A training text is judged by the beginning of its first window."""
    keep = [i for i, owner in enumerate(tokens.owner) if i == 0 or owner != tokens.owner[i - 1]]
    return Tokens(tokens.ids[keep, :TRAIN_TOKENS], tokens.mask[keep, :TRAIN_TOKENS], tuple(tokens.owner[i] for i in keep))


def _first_windows(encoder: MiniLM, texts: Sequence[str], *, batch_size: int = 64) -> Float[np.ndarray, "text dim"]:
    out = np.zeros((len(texts), WIDTH), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in track(range(0, len(order), batch_size), "encode prompts"):
        chosen = order[first : first + batch_size]
        out[chosen] = encoder.encode_windows(_first_window(encoder.tokenize([texts[i] for i in chosen]))).numpy()
    return out
