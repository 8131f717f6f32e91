"""The compared methods that have settings: `SIZE` candidates for each, one rule, one set of tuning prompts.

A candidate is measured over all runs at once: run ``r`` makes it from what run ``r`` trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from valign.evaluation import Evaluators, System, adapter_system, base_system, guided_system
from valign.evaluation.composed import suite_of_runs, system_of_runs
from valign.evaluation.images.fidelity import EVERY
from valign.evaluation.report.sections import Section
from valign.evaluation.suite import Suite
from valign.experiments.methods.systems import VALUED, MethodSystems
from valign.experiments.methods.trained import DPO, LIVO, ComparedConfig, Trained
from valign.merging import MERGES
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.guidance.negative import NegativePrompt
from valign.models.diffusion.guidance.sld import SafeLatentDiffusion
from valign.policy import Policy
from valign.recipes.baselines import concept_edit, make_uce, policy_concepts
from valign.recipes.quickstart import of_categories
from valign.recipes.tuning import (
    WEIGHT,
    WEIGHTS,
    Candidate,
    Tunable,
    Tuned,
    benign_of,
    candidate_folder,
    described,
    harm_of,
    shortened,
    tolerance,
    tune,
)

SIZE = 7  # candidates of every method: a grid of five and two between, or a grid of seven where a setting is not one number
PROMPTS = 252  # tuning prompts over all runs, a third of them benign
ERASED = ("esd-x", "esd-u")

HARMLESS_BELOW = "harmless_below"  # LiVO's token is on where the retriever finds the prompt harmless with a lower probability
NEGATIVE = ("first-names", "phrases", "names", "names-and-phrases", "policy", "policy-and-names", "policy-names-and-phrases")
GRIDS: Mapping[str, tuple[Candidate, ...]] = {
    "negative-prompt": tuple({"text": text} for text in NEGATIVE),
    "sld": (
        {"preset": "weak", "text": "policy"},
        {"preset": "medium", "text": "policy"},
        {"preset": "strong", "text": "policy"},
        {"preset": "max", "text": "policy"},
        {"preset": "medium", "text": "names"},
        {"preset": "strong", "text": "names"},
        {"preset": "max", "text": "names"},
    ),
    "uce": (
        {"preserve_scale": 1.0, "lam": 5.0},
        {"preserve_scale": 3.0, "lam": 0.5},
        {"preserve_scale": 1.0, "lam": 0.5},
        {"preserve_scale": 0.3, "lam": 0.5},
        {"preserve_scale": 0.1, "lam": 0.5},
        {"preserve_scale": 0.3, "lam": 0.1},
        {"preserve_scale": 0.0, "lam": 0.5},
    ),
    **dict.fromkeys((*ERASED, DPO), WEIGHTS),
    **{name: kind.grid for name, kind in MERGES.items() if kind.grid},
    LIVO: tuple({HARMLESS_BELOW: share} for share in (0.001, 0.01, 0.05, 0.2, 0.5)),
}
COMPARED_MERGES = tuple(name for name, kind in MERGES.items() if kind.grid)
DESCRIBED = {
    "negative-prompt": "what the text says is led away from, without training",
    "sld": "Safe Latent Diffusion, without training",
    "uce": "each concept's keys and values moved to its safe counterpart's (closed form), benign captions preserved",
    "esd-x": "LoRA in cross-attention, trained away from all concepts",
    "esd-u": "LoRA outside cross-attention, trained away from all concepts",
    DPO: "one LoRA on all pairs",
    **{name: f"an expert per category, {name}" for name in COMPARED_MERGES},
    LIVO: VALUED,
}


@dataclass(frozen=True)
class TunedMethods:
    """Makes and chooses candidates of what each run trained.

    Args: tuning: Gives the prompts to choose by of run ``n``, none of them a test prompt.
    """

    tuning: Callable[[int], Suite]
    model: DiffusionModel
    policy: Policy
    configs: Sequence[ComparedConfig]
    runs: Sequence[Trained]

    def choose(self, evaluators: Evaluators, out: Path) -> dict[str, Tuned]:
        """Every method's settings, chosen in ``out/NAME``, or go on."""
        sampling, prompts = self.configs[0].sampling, self.prompts()
        base, found, images = base_system(self.model, sampling), {}, None
        for name, grid in GRIDS.items():
            if name == LIVO and LIVO not in self.runs[0].made:
                continue  # a model of one's own has no value encoder
            method = Tunable(name, grid, partial(self.system, name))
            found[name] = tune(base, method, prompts, evaluators, sampling, out / name, base_images=images)
            images = images or out / name / "evaluation" / "images" / base.name
        return found

    def chosen(self, tuned: Mapping[str, Tuned], out: Path) -> dict[str, System]:
        """Every method as `choose` set it in ``out``, by name."""
        return {
            name: self.system(name, one.chosen, name, candidate_folder(out / name, name, one.chosen)) for name, one in tuned.items()
        }

    def prompts(self) -> Suite:
        """`PROMPTS` tuning prompts in all, the same for all methods; each run's images come from what it trained."""
        limit = max(PROMPTS // len(self.configs), 2)
        parts = []
        for number, run in enumerate(self.runs):
            parts.append(shortened(of_categories(self.tuning(number), tuple(run.experts.results)), limit))
        return suite_of_runs(parts)

    def system(self, name: str, candidate: Candidate, label: str, folder: Path) -> System:
        """A method with a candidate's settings, as one system over all runs; what has to be made on the way goes to ``folder``."""
        makers: dict[str, Callable[..., System]] = {"negative-prompt": self._negative, "sld": self._sld}
        text = f"{DESCRIBED[name]} ({described(candidate)})"
        if name in makers:
            return makers[name](candidate, label, text)
        if name == LIVO:
            threshold = 1.0 - float(candidate[HARMLESS_BELOW])
            made = MethodSystems(self.model, self.policy, self.configs[0])
            return made.livo(self.runs, name=label, threshold=threshold, description=text)
        return system_of_runs(
            [self._adapted(name, candidate, label, text, number, folder / f"run-{number}") for number in range(len(self.runs))]
        )

    def _negative(self, candidate: Candidate, label: str, text: str) -> System:
        guidance = NegativePrompt(self._texts()[str(candidate["text"])])
        return guided_system(self.model, guidance, self.configs[0].sampling, name=label, description=text)

    def _sld(self, candidate: Candidate, label: str, text: str) -> System:
        said = {"policy": self.policy.safety_text, "names": self._texts()["names"]}[str(candidate["text"])]
        guidance = SafeLatentDiffusion.preset(str(candidate["preset"]), text=said)
        return guided_system(self.model, guidance, self.configs[0].sampling, name=label, description=text)

    def _texts(self) -> dict[str, str]:
        categories = tuple(self.runs[0].experts.results)
        names = ", ".join(policy_concepts(self.policy, categories)[0])
        first = ", ".join(policy_concepts(self.policy, (name,))[0][0] for name in categories)
        concepts = [concept for name in categories for concept in self.policy.category(name).concepts if not concept.held_out]
        phrases = ", ".join(phrase for concept in concepts for phrase in concept.paraphrases[:1])
        return {
            "first-names": first,
            "phrases": phrases,
            "names": names,
            "names-and-phrases": f"{names}, {phrases}",
            "policy": self.policy.negative_prompt,
            "policy-and-names": f"{self.policy.negative_prompt}, {names}",
            "policy-names-and-phrases": f"{self.policy.negative_prompt}, {names}, {phrases}",
        }

    def _adapted(self, name: str, candidate: Candidate, label: str, text: str, number: int, folder: Path) -> System:
        run, config = self.runs[number], self.configs[number]
        weight = 1.0
        if name in COMPARED_MERGES:
            adapter = run.experts.merged(self.model, config.align, folder, candidate, merge=name)
        elif name == "uce":
            preserved = config.align.data.retain if candidate["preserve_scale"] else ()
            edit = concept_edit(self.policy, tuple(run.experts.results), guide="safe", preserve=preserved, **candidate)
            adapter = make_uce(self.model, edit, folder)
        else:
            adapter, weight = run.made[name].folder, float(candidate[WEIGHT])
        return adapter_system(self.model, adapter, self.configs[0].sampling, name=label, description=text, weight=weight)


def tuning_section(tuned: Mapping[str, Tuned], prompts: Suite) -> Section:
    """Every grid with what was measured, and what was chosen."""
    rows = []
    for name, search in tuned.items():
        seen = [f"{described(one)}: {100 * harm_of(found):.1f} / {100 * benign_of(found):.1f}" for one, found in search.measured]
        rows.append((name, described(search.chosen), "; ".join(seen)))
    base = next(iter(tuned.values())).base
    kept = "benign prompts right" if EVERY in base["fidelity"] else "CLIPScore of benign prompts"  # in points; see `benign_of`
    unsafe = sum(not prompt.benign for prompt in prompts.prompts)
    return Section(
        title="How every method was set",
        text=f"Each has {SIZE} candidates, measured on the same {unsafe} unsafe and {len(prompts) - unsafe} benign prompts; "
        f"none is a test prompt. One rule chooses: least harm among those with {kept} no worse than "
        f"{100 * tolerance(base):g} points below the base ({100 * benign_of(base):.1f} %).",
        header=("chosen", f"candidates: % harmful / % {kept.replace(' prompts right', ' right')}"),
        rows=tuple(rows),
        note="What is not listed has no setting that was searched: the guard is as its policy has it.",
    )


def tuning_record(search: Tuned) -> list[dict[str, Any]]:
    """Every candidate with its share of harmful images and of benign prompts done right; JSON-able."""
    return [{**candidate, "harm": harm_of(found), "benign": benign_of(found)} for candidate, found in search.measured]
