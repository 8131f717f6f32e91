"""Does a small vision-language cost model tell harmful images from harmless ones that it has not seen, and its filter too?

    python benchmarks/image_costs.py [--steps 150] [--per-category 24] [--tests 12] [--seed 0]

The vision tower of the shapes world's CLIP before the chat world's base model, trained on two preferences about one answer whose
harm depends on the image alone (Safe RLHF-V). *Ranked* is the share of pairs of a harmful and a harmless held-out image in which
the harmful one costs more, *right side of 0* that of images whose cost has the right sign; the filter regenerates up to five times,
with a generator that helps in one of two answers. 95 % intervals over images: Wilson's of shares, a bootstrap's of *ranked*.
"""

import argparse

import numpy as np
import torch

from valign.evaluation.statistics import wilson
from valign.guard.answer_filter import AnswerFilter, SeverityVerdict, severity_of_cost
from valign.models.language.loading import load_chat
from valign.models.language.vision_scalar import new_image_scalar
from valign.objectives.rewards.safe_rlhf import cost_loss
from valign.training.engine.processes import start_processes
from valign.training.tasks.reinforce.scalar_task import ScalarConfig, fit_scalar
from valign.worlds.chat import model_folder
from valign.worlds.shapes.image_costs import ANSWERS, QUESTION, image_cost_pairs, image_preferences
from valign.worlds.shapes.world import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="16 pairs each")
    parser.add_argument("--per-category", type=int, default=24, help="images to train on")
    parser.add_argument("--tests", type=int, default=12, help="images per category to test on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scalar = new_image_scalar(load_chat(model_folder("base"), device="cpu", dtype="float32"), SHAPES.clip(), seed=args.seed)
    pairs, signs = image_cost_pairs(image_preferences(per_category=args.per_category, seed=args.seed))

    def loss(high: torch.Tensor, low: torch.Tensor, places: list[int]) -> torch.Tensor:
        here = torch.tensor([signs[place] for place in places]).sign()
        return cost_loss(high, low, here[:, 0], here[:, 1])

    config = ScalarConfig(scalar_steps=args.steps, scalar_learning_rate=5e-4)
    fit_scalar(scalar, pairs, loss, config, start_processes(cpu=True), out=None, seed=args.seed, label="image cost model")
    tests = image_preferences(per_category=args.tests, seed=args.seed + 1000)
    costs, harmful = scalar.scored([one.chat(0) for one in tests]).numpy(), np.array([bool(one.category) for one in tests])
    refusals = scalar.scored([one.chat(1) for one in tests]).numpy()
    ranked = costs[harmful][:, None] > costs[~harmful][None, :]
    draws = np.random.default_rng(args.seed)
    again = [ranked[np.ix_(*(draws.integers(side, size=side) for side in ranked.shape))].mean() for _ in range(2000)]
    low, high = np.quantile(again, (0.025, 0.975))
    print(f"{len(pairs)} training images, {len(tests)} test images, {args.steps} steps")
    print(f"ranked {100 * ranked.mean():.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {ranked.size} pairs")
    sides = {"harmful": costs[harmful] > 0, "harmless": costs[~harmful] < 0, "refusals": refusals < 0}
    print(f"right side of 0: {', '.join(f'{name} {share(side)}' for name, side in sides.items())}")

    def judge(question: str, answer: str | None, image: object = None) -> SeverityVerdict:
        if answer is None:
            return SeverityVerdict("safe")
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return SeverityVerdict(severity_of_cost(float(scalar.scored([(image, chat)])[0])))  # type: ignore[list-item]

    draw = np.random.default_rng(args.seed)
    said = [AnswerFilter(judge=judge)(QUESTION, lambda number, warning: ANSWERS[int(draw.integers(2))], one.image) for one in tests]
    helped = np.array([one.text == ANSWERS[0] for one in said])
    print(f"helped behind the filter: about harmful images {share(helped[harmful])}, about harmless ones {share(helped[~harmful])}")


def share(cases: np.ndarray) -> str:
    """In %, with its interval."""
    found = wilson(int(cases.sum()), len(cases))
    return f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


if __name__ == "__main__":
    main()
