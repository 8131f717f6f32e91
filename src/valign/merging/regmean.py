"""RegMean: the change of weight that answers, on what each layer reads, as each expert does on its own prompts (arXiv 2212.09849).

With the preservation of MACE's fusion (arXiv 2403.06135, equation 7), and closed-form edits (UCE) in the same system. For a linear
layer with base weight ``W``, experts ``s_i Delta_i``, second moments ``G_i`` of what it reads of each expert's prompts, ``G_P`` of
benign captions and edits ``e -> g`` at weight ``a``, the change X minimizes::

    sum_i tr[(X - s_i Delta_i) G_i (X - s_i Delta_i)^T] + lam tr[X G_P X^T] + a sum |X e - W (g - e)|^2 + mu |X|^2
    X = (sum_i s_i Delta_i G_i + a sum W (g - e) e^T) M^-1,   M = sum_i G_i + lam G_P + a sum e e^T + mu I

As ``Delta_i = B_i A_i``, X is exactly low-rank: each ``B_i`` stays and ``A_i`` becomes ``A_i G_i M^-1``. Nothing is trained.
"""

import logging
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from safetensors.torch import load_file
from torch import Tensor

from valign.checks import UserError, option
from valign.data.prompts.overlap import fold
from valign.files import hash_value
from valign.merging.base import Calibration, MergeContext, MergeMethod
from valign.merging.calibration import FEW, check_model
from valign.merging.deltas import Delta
from valign.merging.denoising import by_hash, on_device
from valign.merging.experts import Expert, compatible
from valign.merging.moments import Moments, activation_moments, block_of, text_moments
from valign.merging.regression import RIDGE, Edit, regmean
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.text_states import text_readers, token_states
from valign.models.files.tensor_stream import stream_tensors
from valign.progress import track

METHOD = Method(
    slug="regmean",
    title="RegMean fusion of experts, with preservation and edits",
    paper="arXiv 2212.09849",
    room="merging",
    entry="valign.merging.regmean:regmean",
    fidelity="exact",
    note="the closed form on changes of weight, low-rank in and out, solved in float64; preservation and edits are "
    "terms of the same system",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RegMean(MergeMethod):
    """Answer as each expert does on what the layers read of its own prompts (RegMean, arXiv 2212.09849)."""

    lam: float = option(1.0, help="weight of the benign captions, on which the merge leaves the model as it is", low=0)
    ridge: float = option(RIDGE, help="smallest eigenvalue of the system, over the mean one of the captions'", low=0)
    rank: int | None = option(None, help="rank of the result in every module; the error is reported", low=1)
    per_category: int = option(120, help="unsafe prompts per expert", low=1)
    captions: int = option(300, help="benign captions", low=0, needs={"lam": ()})
    padding: bool = option(True, help="also count what layers read of the padding after a text")
    inputs: Literal["own", "merged"] = option(
        "own", help="what layers read that depend on other layers: in each expert's model, or in the merged one (RegMean++)"
    )
    states: int = option(4, help="denoising states per prompt, for layers that do not read the text", low=1)
    steps: int = option(20, help="denoising steps of a whole trajectory", low=1)
    edit_weight: float = option(1.0, help="weight of each edited token state", above=0)
    edit_tokens: Literal["last", "all"] = option("last", help="an edited text's last word, or all of its padded states")
    batch_size: int = option(8, help="prompts at a time", low=1)
    seed: int = option(0, help="of every random draw")

    calibrated: ClassVar[bool] = True
    preserves: ClassVar[bool] = True
    grid: ClassVar[tuple[Mapping[str, float], ...]] = (
        {"weight": 0.7, "lam": 1.0},
        {"weight": 0.7, "lam": 0.1},
        {"weight": 0.9, "lam": 1.0},
        {"weight": 0.9, "lam": 0.1},
        {"weight": 1.2, "lam": 1.0},
        {"weight": 1.2, "lam": 0.1},
        {"weight": 1.7, "lam": 1.0},
    )
    recorded: ClassVar[tuple[str, ...]] = ("lam", "per_category", "captions", "inputs", "seed")
    example: ClassVar[str] = "runs/hate runs/violence -o runs/merged --model shapes --data runs/data"

    def record(self, experts: Sequence[Expert], context: MergeContext) -> dict[str, Any]:
        seen = context.calibration
        read = {"model": seen.model_name, "texts": hash_value([seen.prompts, seen.captions, seen.edits])} if seen else {}
        return super().record(experts, context) | read

    def __call__(self, experts: Sequence[Expert], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        if context.calibration is None:
            raise UserError("regmean must have a model, unsafe prompts and benign captions; got none. Give all three.")
        modules = compatible("regmean", experts, allow_base_mismatch=context.allow_base_mismatch)
        model, texts = context.calibration.model(), self._texts(experts, context.calibration)
        check_model("regmean", model, experts, modules, context.allow_base_mismatch)
        read, edits = (
            self._text_moments(model, texts, modules, context.kept),
            self._edits(model, context.calibration.edits, modules),
        )
        others = [module for module in modules if module not in read[0]]
        self._say_idle(bool(read[0]), bool(others), bool(context.calibration.edits))
        conditions: dict[str, float] = {}
        if others and self.inputs == "merged":
            known = dict(self._solve(experts, read, edits, sorted(read[0]), context, conditions))
            merged = self._in_sequence(model, experts, texts, others, known, context, conditions)
            stream: Iterator[tuple[str, Delta]] = ((module, merged[module]) for module in modules)
        else:
            active = [{module: on_device(expert.factors(module), model.device) for module in modules} for expert in experts]
            for seen, group, changes in zip(read, texts, [*active, {}]) if others else ():
                seen |= self._activation_moments(model, others, group, changes)
            stream = self._solve(experts, read, edits, modules, context, conditions)
        return self._reported(stream, conditions, context)

    def _say_idle(self, reads_text: bool, activations: bool, edited: bool) -> None:
        """Warn of options that were set and change nothing with these experts and texts."""
        why = {
            "all adapted layers read the text alone": () if activations else ("inputs", "states", "steps", "batch_size"),
            "no adapted layer reads the text": () if reads_text else ("padding",),
            "there are no edits": () if edited else ("edit_weight", "edit_tokens"),
        }
        for reason, names in why.items():
            for name in names:
                if getattr(self, name) != getattr(type(self), name):
                    log.warning("%s %s changes nothing here: %s.", name, getattr(self, name), reason)

    def _texts(self, experts: Sequence[Expert], calibration: Calibration) -> list[list[str]]:
        """The prompts of each expert, then the captions, each drawn by hash. Raises: UserError for what cannot be right."""
        chosen = []
        for expert in experts:
            known = calibration.prompts.get(expert.name) or calibration.prompts.get(str(expert.file.metadata.get("category", "")))
            drawn = by_hash(known or (), self.seed)[: self.per_category]
            if not drawn:
                named = ", ".join(calibration.prompts) or "none"
                raise UserError(f"regmean: {expert.name} must have unsafe prompts of its category, got only those of {named}.")
            if len(drawn) < FEW:
                log.warning(
                    "%s must have %d prompts or more to be told well, got %d; the fusion knows little of it. Add prompts.",
                    expert.name,
                    FEW,
                    len(drawn),
                )
            chosen.append(drawn)
        captions = by_hash(calibration.captions, self.seed)[: self.captions]
        if self.lam and not captions:
            raise UserError("regmean must have benign captions to preserve, got none. Give some, or set lam to 0.")
        unsafe = {fold(text) for drawn in chosen for text in drawn}
        edited = re.compile("|".join(rf"\b{re.escape(concept)}\b" for concept, _ in calibration.edits) or r"(?!)", re.IGNORECASE)
        both = [text for text in captions if fold(text) in unsafe or edited.search(text)]
        if both:
            raise UserError(
                f"regmean: benign captions must not hold what is unsafe or edited, got {len(both)} that do, such as {both[0]!r}. "
                "Leave them out."
            )
        return [*chosen, captions]

    def _text_moments(
        self, model: DiffusionModel, texts: Sequence[Sequence[str]], modules: Sequence[str], kept: Path | None
    ) -> list[dict[str, Tensor]]:
        """Of each group of texts, for the modules that read the text alone: one matrix for all of them, whatever the weights."""
        readers = [module for module in modules if module in text_readers(model)]
        found: list[dict[str, Tensor]] = []
        for group in texts if readers else [()] * len(texts):
            matrix = self._kept_moments(model, group, kept) if group else None
            found.append(dict.fromkeys(readers, matrix) if matrix is not None else {})
        return found

    def _kept_moments(self, model: DiffusionModel, group: Sequence[str], kept: Path | None) -> Tensor:
        if kept is None:
            return text_moments(model, group, padding=self.padding)
        path = kept / f"moments-{hash_value([model.fingerprint(), list(group), self.padding])[:16]}.safetensors"
        if not path.exists():
            stream_tensors(path, [("moments", text_moments(model, group, padding=self.padding))])
        return load_file(path)["moments"]

    def _activation_moments(
        self, model: DiffusionModel, modules: Sequence[str], prompts: Sequence[str], active: Mapping[str, Delta]
    ) -> dict[str, Tensor]:
        if not prompts:
            return {}
        return activation_moments(
            model,
            modules,
            prompts,
            active=active,
            states=self.states,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _edits(self, model: DiffusionModel, pairs: Sequence[tuple[str, str]], modules: Sequence[str]) -> dict[str, Edit]:
        """The same states for every layer that reads the text, moved as that layer's own weight says."""
        if not pairs:
            return {}
        layers = {name: layer for name, layer in text_readers(model).items() if name in set(modules)}
        if not layers:
            raise UserError("regmean edits need experts on keys and values of cross-attention, got none. Train such experts.")
        edited, guides = (token_states(model, texts, self.edit_tokens).cpu() for texts in zip(*pairs, strict=True))
        away = (guides - edited).double()
        return {
            name: Edit(edited, away @ layer.weight.detach().cpu().double().T, self.edit_weight) for name, layer in layers.items()
        }

    def _solve(
        self,
        experts: Sequence[Expert],
        read: Sequence[Moments],
        edits: Mapping[str, Edit],
        modules: Sequence[str],
        context: MergeContext,
        conditions: MutableMapping[str, float],
    ) -> Iterator[tuple[str, Delta]]:
        return regmean(
            experts,
            read[:-1],
            read[-1] or None,
            lam=self.lam,
            ridge=self.ridge,
            edits=edits,
            rank=self.rank,
            modules=modules,
            errors=context.errors,
            conditions=conditions,
            allow_base_mismatch=context.allow_base_mismatch,
        )

    def _in_sequence(
        self,
        model: DiffusionModel,
        experts: Sequence[Expert],
        texts: Sequence[Sequence[str]],
        modules: Sequence[str],
        known: Mapping[str, Delta],
        context: MergeContext,
        conditions: MutableMapping[str, float],
    ) -> dict[str, Delta]:
        """RegMean++ (arXiv 2508.03121): block after block, each on what it reads of the blocks merged before it."""
        merged = dict(known)
        order = activation_moments(model, modules, texts[0][:1], states=1, steps=1)  # a U-Net's modules are not listed as they run
        blocks = list(dict.fromkeys(map(block_of, order)))
        for block in track(blocks, "merging blocks"):
            own = [module for module in modules if block_of(module) == block]
            before = {module: on_device(delta, model.device) for module, delta in merged.items()}
            read = []
            for n, group in enumerate(texts):
                inside = {module: on_device(experts[n].factors(module), model.device) for module in own} if n < len(experts) else {}
                read.append(self._activation_moments(model, own, group, before | inside))
            merged |= dict(self._solve(experts, read, {}, own, context, conditions))
        return merged

    @staticmethod
    def _reported(
        stream: Iterator[tuple[str, Delta]], conditions: Mapping[str, float], context: MergeContext
    ) -> Iterator[tuple[str, Delta]]:
        yield from stream
        context.results["condition_worst"] = max(conditions.values())
