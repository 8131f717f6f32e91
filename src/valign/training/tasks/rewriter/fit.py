"""Train the editing model on paired prompts and on harmless captions.

Loss of a step: cross-entropy of the tags of a batch of prompts (words that must change count `CHANGE_WEIGHT`, words that the safe
prompt changed without need `OPEN_WEIGHT`), and cross-entropy of masked words in a batch of pairs and captions. Each step draws its
batch from a generator of its own, so a fit that was interrupted goes on as if it had not been.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from valign.checks import UserError, check_options, option
from valign.models.devices import cpu_has
from valign.models.encoders.minilm import LAYERS, WIDTH, MiniLM, Tokens, run_layers
from valign.models.heads.edit_model import (
    DELETE,
    KEEP,
    MASK,
    REPLACE,
    fill_input,
    fill_logits,
    pieces_of,
    tag_logits,
    word_spans,
    words_of,
)
from valign.text import fold
from valign.text.function_words import FUNCTION_WORDS
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule, keep_peaks
from valign.training.engine.task import LoopConfig, TrainingTask
from valign.training.tasks.rewriter.labels import EditExample

CHANGE_WEIGHT, OPEN_WEIGHT = 2.0, 0.3
MOST_MASKS = 3  # of a caption
FEWEST = 3  # times that a word must stand in harmless texts to be filled in
LONGEST = 20  # words of a caption that is learned from: padding costs as much as words
PAIRED = 0.4  # of a batch of masked texts; the others are captions
UNTOUCHED = 0.25  # of a batch of tagged prompts: harmless ones, of which every word is kept


@dataclass(frozen=True, kw_only=True)
class RewriterConfig:
    """Everything that shapes a fit; stored in the model's notes."""

    pairs: int = option(1500, help="paired prompts that are learned from, at most", low=1)
    steps: int = option(600, help="steps", low=1)
    batch_size: int = option(32, help="prompts to tag per step, and as many masked texts", low=4)
    lr: float = option(2e-3, help="learning rate of the outputs; AdamW, linear warm-up over 5 % and decay to 0", above=0, rare=True)
    encoder_lr: float = option(2e-4, help="learning rate of tuned encoder layers", above=0, rare=True)
    weight_decay: float = option(0.01, help="weight decay of AdamW", rare=True)
    tuned_layers: int = option(3, help="upper encoder layers of its own", low=1, high=LAYERS, flags=("--tune-layers",))
    judge_buckets: int = option(65536, help="size of the judge's n-gram hash", low=64, rare=True)
    checkpoint_every: int = option(250, help="steps between checkpoints", low=1, rare=True)
    seed: int = option(0, help="random seed of the fit")

    def __post_init__(self) -> None:
        check_options(self)


def vocabulary_of(texts: Sequence[str], encoder: MiniLM) -> tuple[str, ...]:
    """Content words of harmless texts that are one token and stand there `FEWEST` times or more, sorted."""
    counts = Counter(fold(word) for text in texts for word in words_of(text))
    return tuple(
        sorted(
            word
            for word, count in counts.items()
            if count >= FEWEST
            and word.isalpha()
            and len(word) > 2
            and word not in FUNCTION_WORDS
            and encoder.id_of(word) is not None
        )
    )


@dataclass(frozen=True)
class Masked:
    """A text with masks, and the words that belong there, by number in the vocabulary; -1 for one that is not in it."""

    text: str
    targets: tuple[int, ...]


def with_masks(text: str, places: Sequence[int]) -> str:
    """The text with ``[MASK]`` for these words, by number."""
    out, last = "", 0
    for number, (start, end) in enumerate(word_spans(text)):
        if number in places:
            out += text[last:start] + MASK
            last = end
    return out + text[last:]


class EditTask(TrainingTask):
    """The weights of one editing model, but for its judge."""

    max_norm = 1.0

    def __init__(
        self,
        examples: Sequence[EditExample],
        captions: Sequence[str],
        categories: Sequence[str],
        vocabulary: Sequence[str],
        encoder: MiniLM,
        config: RewriterConfig,
    ) -> None:
        self.examples, self.captions = examples, captions
        self.categories, self.encoder, self.config = tuple(categories), encoder, config
        self.numbers = {word: number for number, word in enumerate(vocabulary)}
        self.embeddings = encoder.embeddings(vocabulary)
        self.mask_id = encoder.id_of(MASK)
        self.weights = _first_weights(len(categories), len(vocabulary), encoder, config)
        upper = [tensor for name, tensor in self.weights.items() if name.startswith("upper.")]
        small = [tensor for name, tensor in self.weights.items() if not name.startswith("upper.")]
        groups = [{"params": small, "lr": config.lr}, {"params": upper, "lr": config.encoder_lr}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        keep_peaks(self.optimizer)
        self.schedule = Schedule(steps=config.steps, warmup=max(1, config.steps // 20), decay="linear")
        self.loop = LoopConfig(steps=config.steps, label="fit the rewriter", checkpoint_every=config.checkpoint_every)
        self.paired = [place for place, one in enumerate(examples) if any(self._targets(one)[1])]
        for tensor in self.weights.values():
            tensor.requires_grad_(True)

    def tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    def gradients(self, step: int) -> dict[str, float]:
        random = Random(f"{self.config.seed} {step}")
        tags, fills = self._tag_loss(random), self._fill_loss(random)
        (tags + fills).backward()
        return {"loss": float((tags + fills).detach()), "tags": float(tags.detach()), "fills": float(fills.detach())}

    def _tag_loss(self, random: Random) -> Tensor:
        untouched = round(self.config.batch_size * UNTOUCHED)
        chosen = [self.examples[random.randrange(len(self.examples))] for _ in range(self.config.batch_size - untouched)]
        texts = [one.prompt for one in chosen] + [random.choice(self.captions) for _ in range(untouched)]
        rows, goals, weights = [], [], []
        windows = [next(iter(self.encoder.with_places(text))) for text in texts]
        for row, (text, (_, places)) in enumerate(zip(texts, windows)):
            example = chosen[row] if row < len(chosen) else None
            for word, pieces in pieces_of(word_spans(text), places).items():
                goal, weight = self._goal(example, word)
                for piece in pieces:
                    rows.append((row, piece))
                    goals.append(goal)
                    weights.append(weight / len(pieces))
        states = self._states(self.encoder.joined([tokens for tokens, _ in windows]))
        at = torch.tensor(rows)
        losses = cross_entropy(tag_logits(self.weights, states[at[:, 0], at[:, 1]]), torch.tensor(goals), reduction="none")
        shares = torch.tensor(weights)
        return (losses * shares).sum() / shares.sum()

    def _goal(self, example: EditExample | None, word: int) -> tuple[int, float]:
        if example is None or not example.change[word]:
            return KEEP, OPEN_WEIGHT if example is not None and example.open[word] else 1.0
        if example.gone[word]:
            return DELETE, CHANGE_WEIGHT
        known = example.category in self.categories
        return REPLACE + (self.categories.index(example.category) if known else 0), CHANGE_WEIGHT

    def _fill_loss(self, random: Random) -> Tensor:
        texts, targets = [], []
        for number in range(self.config.batch_size):
            if self.paired and number < self.config.batch_size * PAIRED:
                text, goal = self._of_pair(self.examples[random.choice(self.paired)], random)
            else:
                text, goal = self._caption(random.choice(self.captions), random)
            texts.append(text)
            targets.append(goal)
        windows = [next(iter(self.encoder.with_places(text)))[0] for text in texts]
        tokens = self.encoder.joined(windows)
        states = self._states(tokens)
        goals = torch.full(tokens.ids.shape, -100)
        mask_id = self.mask_id
        assert mask_id is not None
        for row, goal in enumerate(targets):
            at = tokens.ids[row].eq(mask_id).nonzero()[:, 0][: len(goal)]
            goals[row, at] = torch.tensor([one if one >= 0 else -100 for one in goal[: len(at)]], dtype=torch.long)
        known = goals >= 0
        if not bool(known.any()):
            return states.sum() * 0
        return cross_entropy(fill_logits(self.weights, states[known], self.embeddings), goals[known])

    def _targets(self, example: EditExample) -> tuple[list[int], list[bool]]:
        """The words to be masked, and whether the safe prompt's word there is in the vocabulary."""
        places = [place for place, one in enumerate(example.instead) if one and (example.change[place] or example.open[place])]
        return places, [fold(example.instead[place]) in self.numbers for place in places]

    def _of_pair(self, example: EditExample, random: Random) -> tuple[str, list[int]]:
        """The prompt with the safe prompt's words masked, some of them given, and the prompt's own words as a hint."""
        places, _ = self._targets(example)
        own = words_of(example.prompt)
        hidden = [place for place in places if example.change[place] or random.random() < 0.5] or places
        text, last = "", 0
        for place, (start, end) in enumerate(word_spans(example.prompt)):
            if place in places:
                text += example.prompt[last:start] + (MASK if place in hidden else example.instead[place])
                last = end
        text += example.prompt[last:]
        hint = [own[place] for place in hidden]
        return fill_input(text, hint), [self.numbers.get(fold(example.instead[place]), -1) for place in hidden]

    def _caption(self, caption: str, random: Random) -> tuple[str, list[int]]:
        own = words_of(caption)
        known = [place for place, word in enumerate(own) if fold(word) in self.numbers]
        chosen = sorted(random.sample(known, min(len(known), random.randint(1, MOST_MASKS))))
        return with_masks(caption, chosen), [self.numbers[fold(own[place])] for place in chosen]

    def _states(self, tokens: Tokens) -> Tensor:
        first = LAYERS - self.config.tuned_layers
        own = {name.removeprefix("upper."): tensor for name, tensor in self.weights.items() if name.startswith("upper.")}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has("amx_bf16", "avx512_bf16")), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                lower = self.encoder.lower(tokens, first)
            hidden = run_layers(lower, tokens.mask, own, range(first, LAYERS))
        return hidden.float()


def _first_weights(categories: int, words: int, encoder: MiniLM, config: RewriterConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * WIDTH**-0.5

    weights = {
        "tag.weight": normal(REPLACE + categories, WIDTH),
        "tag.bias": torch.zeros(REPLACE + categories),
        "fill.weight": normal(WIDTH, WIDTH),
        "fill.bias": torch.zeros(WIDTH),
        "words.bias": torch.zeros(words),
    }
    for layer in range(LAYERS - config.tuned_layers, LAYERS):
        own = {name: tensor for name, tensor in encoder.weights.items() if name.startswith(f"encoder.layer.{layer}.")}
        weights |= {f"upper.{name}": tensor.clone() for name, tensor in own.items()}
    return weights


def fit_edits(
    examples: Sequence[EditExample],
    captions: Sequence[str],
    categories: Sequence[str],
    vocabulary: Sequence[str],
    encoder: MiniLM,
    config: RewriterConfig,
    *,
    out: Path | None = None,
) -> dict[str, Tensor]:
    """The editing model's tensors, but for the judge's. Same examples, config and machine: same weights; ``out`` resumes.

    Raises: UserError without an example, a caption or a word to fill in.
    """
    for name, found in (("examples", examples), ("captions", captions), ("vocabulary", vocabulary)):
        if not found:
            raise UserError(f"fit_edits.{name} must not be empty, got none. Give paired prompts (rows that share a pair_id).")
    short = [caption for caption in captions if len(caption.split()) <= LONGEST]
    task = EditTask(examples, short or captions, categories, vocabulary, encoder, config)
    TrainingLoop(task, start_processes(cpu=True), out=out).run()
    return {name: tensor.detach() for name, tensor in task.weights.items()}
