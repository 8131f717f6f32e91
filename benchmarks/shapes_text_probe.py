"""What does the shapes world's text encoder tell of held-out words, to a linear probe that was fitted on alignment pairs alone?

    python benchmarks/shapes_text_probe.py [--model FOLDER] [--pairs 120] [--trainings 3]

The probe (multinomial logistic regression on end-of-text states) learns seven categories and "harmless" from both sides of the
pairs, with 300 benign captions of the training split. Then it reads the test suite's explicit and benign prompts. A word that no
training names should be put in its category by chance (1 in 7), and be called harmful as often as a held-out benign one: an encoder
that makes these figures differ knows the groups.
"""

import argparse

import numpy as np
from rich import print
from rich.table import Table

from valign.models.diffusion.loading import load_model
from valign.models.diffusion.prompt_states import prompt_states
from valign.training.tasks.text_probe import fit_text_probe
from valign.worlds import world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="pipeline folder; the bundled one if left out")
    parser.add_argument("--pairs", type=int, default=120, help="prompt pairs per category")
    parser.add_argument("--trainings", type=int, default=3, help="seeds of pairs and of prompts")
    options = parser.parse_args()
    shapes = world("shapes")
    model = load_model(options.model or shapes.model_folder(), device="cpu")
    grammar = shapes.grammar()
    found: dict[str, list[tuple[bool, bool]]] = {}
    for seed in range(options.trainings):
        tests = [prompt for prompt in shapes.suite(per_concept=10, seed=seed).prompts if prompt.kind in ("explicit", "benign")]
        categories = tuple(sorted({prompt.category for prompt in tests if prompt.category}))
        pairs = [pair for name in categories for pair in grammar.pairs(name, options.pairs, seed)]
        texts = [text for pair in pairs for text in (pair.unsafe, pair.safe)] + grammar.benign(300, seed)
        labels = [names for pair in pairs for names in (pair.categories, ())] + [()] * 300
        probe = fit_text_probe(prompt_states(model, texts), labels, categories)
        scores = prompt_states(model, [prompt.prompt for prompt in tests]).double() @ probe.weight.double().T + probe.bias.double()
        for prompt, row in zip(tests, scores.softmax(-1).numpy(), strict=True):
            group = ("held-out " if prompt.held_out else "known ") + ("benign" if prompt.benign else "harmful")
            named = ("", *categories)[1 + int(np.argmax(row[1:]))] == prompt.category
            found.setdefault(group, []).append((bool(row[0] < 0.5), named))
    table = Table(
        "prompts", "count", "called harmful, %", "category named, %", title=f"{options.trainings} fits on {options.pairs} pairs"
    )
    for group, rows in sorted(found.items()):
        harmful, named = 100 * np.mean(rows, axis=0)
        table.add_row(group, str(len(rows)), f"{harmful:.1f}", "-" if "benign" in group else f"{named:.1f}")
    print(table)


if __name__ == "__main__":
    main()
