"""Why does HySAC on the shapes world not reach the paper's order, safe text, safe image, unsafe text, unsafe image?

    python benchmarks/hysac_order.py --seeds 0 1 2

Small networks on frozen features of the world's CLIP stand for its encoders, and train with HySAC's loss on quadruples: as they
are, at other weights of the entailment, other curvature and start, and with one more feature on the image side that says whether
the image shows harm. Printed are the mean distances to the root on test quadruples, and how often each step of the chain holds.
"""

import argparse
from itertools import pairwise

import torch
from torch import nn

from valign.models.hyperbolic.lorentz import root_distance
from valign.models.hyperbolic.space import HyperbolicSpace
from valign.models.hyperbolic.traversal import GROUPS
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings
from valign.objectives.hyperbolic.safety_entailment import SafetyEntailment
from valign.training.tasks.quadruples import embed_all
from valign.worlds import WORLDS

ROWS = {  # name -> weights of the loss; curvature and factor on lengths at the start; whether images tell harm
    "as released": ({"entailment_weight": 1.0}, 1.0, 1.0, False),
    "valign's weights": ({"entailment_weight": 5.0, "within_weight": 5.0}, 1.0, 1.0, False),
    "entailment 20": ({"entailment_weight": 20.0}, 1.0, 1.0, False),
    "curvature 0.2": ({"entailment_weight": 5.0, "within_weight": 5.0}, 0.2, 1.0, False),
    "curvature 5": ({"entailment_weight": 5.0, "within_weight": 5.0}, 5.0, 1.0, False),
    "lengths times 4": ({"entailment_weight": 5.0, "within_weight": 5.0}, 1.0, 4.0, False),
    "as released, images tell harm": ({"entailment_weight": 1.0}, 1.0, 1.0, True),
    "valign's weights, images tell harm": ({"entailment_weight": 5.0, "within_weight": 5.0}, 1.0, 1.0, True),
}


def marked(groups: QuadrupleEmbeddings, tell: bool) -> dict[str, torch.Tensor]:
    """Features of length 1 by group, those of images with one more number."""
    found = {}
    for name in GROUPS:
        features = nn.functional.normalize(getattr(groups, name), dim=1)
        bit = float(name == "unsafe_image") if tell else 0.0
        found[name] = torch.cat([features, features.new_full((len(features), 1), bit)], dim=1)
    return found


def train(
    rows: dict[str, torch.Tensor], test: dict[str, torch.Tensor], name: str, seed: int, steps: int
) -> dict[str, torch.Tensor]:
    """Distances to the root of the test rows."""
    weights, curvature, factor, _ = ROWS[name]
    torch.manual_seed(seed)
    width = rows["safe_text"].shape[1]
    space, objective = HyperbolicSpace(width, curvature=curvature), SafetyEntailment(**weights)
    towers = {m: nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width)) for m in ("text", "image")}
    with torch.no_grad():
        space.alpha_text.fill_(0.0)
        space.alpha_image.fill_(0.0)

    def points(part: dict[str, torch.Tensor], which: torch.Tensor | slice) -> QuadrupleEmbeddings:
        found = {}
        for group in GROUPS:
            kind = group.split("_")[1]
            features = part[group][which]
            found[group] = space.points(0.5 * factor * (features + towers[kind](features)), kind)  # type: ignore[arg-type]
        return QuadrupleEmbeddings(**found)

    parameters = [*space.parameters(), *(p for tower in towers.values() for p in tower.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for _ in range(steps):
        space.clamp()
        e = points(rows, torch.randperm(len(rows["safe_text"]))[:64])
        loss = objective.total(objective.terms(e, space.scale, space.curvature))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        e = points(test, slice(None))
        return {group: root_distance(getattr(e, group), space.curvature) for group in GROUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--per-category", type=int, default=48)
    args = parser.parse_args()
    world = WORLDS["shapes"]
    encoder = world.clip()
    parts = [
        embed_all(encoder, world.quadruples(per_category=count, seed=0, test=test).rows)
        for count, test in ((args.per_category, False), (args.per_category // 4, True))
    ]
    for name in args.rows:
        tell = ROWS[name][3]
        found = [train(*(marked(part, tell) for part in parts), name, seed, args.steps) for seed in args.seeds]
        means = {group: sum(float(one[group].mean()) for one in found) / len(found) for group in GROUPS}
        steps = {
            f"{a} < {b}": sum(float((one[a] < one[b]).float().mean()) for one in found) / len(found) for a, b in pairwise(GROUPS)
        }
        told = ", ".join(f"{group} {value:.3f}" for group, value in means.items())
        print(f"{name}: {told}; " + ", ".join(f"{step} {share:.2f}" for step, share in steps.items()), flush=True)


if __name__ == "__main__":
    main()
