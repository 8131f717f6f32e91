"""Do Co-Merge's votes of different categories fall on the same neurons?

    valign merge co-merge runs/hate runs/violence runs/shocking -o runs/co --model shapes --data runs/data --vote topk
    python benchmarks/vote_overlap.py runs/co

With ``--vote topk`` an expert scores at a neuron on every prompt where it is among its own most active ones. Printed is, for
each pair of experts, which share of the neurons that one scores most at is the other's too, beside the share at random, as the mean
over the modules with Student's interval.
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from valign.evaluation.statistics import t_interval
from valign.merging.votes import Ballot, Votes


def top(ballot: Ballot, expert: int, kept: int) -> set[int]:
    """The units with the most votes for the expert; ties by the larger activation."""
    order = ballot.sums[expert].double() / ballot.sums[expert].double().max().clamp(min=1e-30) * 0.5 + ballot.counts[expert]
    return set(torch.topk(order, kept).indices.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("votes", type=Path, help="folder of a co-merge with --vote topk")
    parser.add_argument("--share", type=float, default=0.1, help="of a module's neurons that count as an expert's most voted")
    args = parser.parse_args()
    votes = Votes.load(args.votes)
    if votes.vote != "topk":
        raise SystemExit(f"{args.votes} must hold votes by topk, got {votes.vote}. Collect them again with --vote topk.")
    for one, other in combinations(range(len(votes.experts)), 2):
        shared = []
        for ballot in votes.ballots["output"].values():
            kept = max(1, round(args.share * ballot.counts.shape[1]))
            shared.append(len(top(ballot, one, kept) & top(ballot, other, kept)) / kept)
        mean = t_interval(np.array(shared))
        pair = f"{votes.experts[one]} and {votes.experts[other]}"
        print(f"{pair}: {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] of {len(shared)} modules; at random {args.share:.3f}")


if __name__ == "__main__":
    main()
