"""The field's terms, once, everywhere: no banned word in code, help, messages or documentation, and one class for one name."""

import ast
import re
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPARED = "longer|more|less|better|worse|larger|smaller|fewer|higher|lower"

# what may not be written, as words of any case (an underscore ends a word) -> what is written in its place
BANNED = {
    "pictures?": "image",
    "peers?": "baseline",
    "(initial|normal|summar|optim|random|factor|orthogonal|standard|token|serial|general)is(e[drs]?|ers|ing|ations?)": "-ize",
    rf"(?<!there )(?<!nor )(is|are|was|were|be)\s+no\s+(?!({COMPARED})\b)[a-z]+": "is not a ...",
    "twins?": "paired prompts, or the other prompt of the pair",
    "heard|eavesdrop(s|ping)?": "recorded, measured",
    "placement|encoders_parked|parked": "offloaded",
    "no other beats": "Pareto-optimal",
    "cheap before dear": "cheapest first",
    "say how things stand": "what is returned",
    "nobody's": "unknown",
}
BANNED_CLASSES = {
    "Attached": "AdapterHandle",
    "Book": "ResultTable",
    "Ear": "an activation hook",
    "Ground": "AttachContext",
    "Instruments": "Evaluators",
    "Judges": "Evaluators",
    "Order": "what is ordered",
    "Pen": "what it writes",
    "Place": "Setting",
    "Room": "what it holds",
    "Studio": "ImageQueue",
    "Trainee": "TrainableAdapter",
    "Versus": "PairedDifference",
}

# (files, text, reason): this text may stand in these files. An entry that excuses nothing fails, too.
ALLOWED = [
    ("src/valign/editing/uce.py", '"picture of {}"', "UCE's own wordings of a concept"),
    ("src/valign/editing/uce.py", '"picture by {}"', "UCE's own wordings of a concept"),
    ("src/valign/evaluation/images/folder.py", '"pictures"', "the step's name and a key of timing records on disk"),
    ("src/valign/evaluation/images/folder.py", "pictures=len(suite)", "a key of run.json"),
    ("src/valign/training/tasks/supervised/diffusion_task.py", '"picture"', "the name of a random draw"),
    ("src/valign/worlds/shapes/vocabulary.py", "picture of", "words of the shapes world's prompts"),
    ("src/valign/cli/*.py", '"--picture"', "an older name of the option --image"),
    ("src/valign/data/images/value_sets.py", '"--pictures"', "an older name of the option --images"),
    ("src/valign/experiments/guard.py", "identical_pictures", "a key of the bench's JSON"),
    ("src/valign/data/images/value_images.py", '"pictures.parquet"', "a file's name on disk"),
    ("src/valign/data/images/value_sets.py", '"pictures', "a key of run.json, and a file's name on disk"),
    ("src/valign/data/images/value_sets.py", "pictures=len(rows)", "a key of run.json"),
    ("src/valign/data/build.py", '"pictures"', "a key of run.json"),
    ("src/valign/serving/image_queue.py", '"pictures"', "a label of the service's metrics"),
    ("src/valign/serving/metrics.py", '"pictures"', "a name of the service's metrics"),
    ("src/valign/serving/audit_record.py", '"pictures"', "a key of the audit log"),
    ("src/valign/guard/rewriting/caption.py", "|picture|", "words that people write in prompts"),
    (
        "src/valign/guard/value_retriever.py",
        "principle that a picture",
        "a chat model's instructions",
    ),
    ("src/valign/guard/rewriting/chat.py", "are no proof", "a chat model's instructions"),
    ("src/valign/cli/data.py", "missing_twin", "an argument of the next"),
    ("src/valign/data/prompts/*.py", "missing_twin", "a key of counts and of run.json"),
    ("src/valign/data/prompts/generated.py", 'rules["twins"]', "a key of the grammar's file"),
    ("src/valign/data/prompts/chat_pairs.py", "coprov2-twins", "the method's name in `valign methods`"),
    ("docs/methods.md", "coprov2-twins", "the method's name in `valign methods`"),
    ("src/valign/data/images/contact_sheet.py", "safe twin, preferred", "drawn on contact sheets, whose pixels stay"),
    ("docs/concepts/policy.md", "Pictures of people", "quotes the bundled policy"),
    ("docs/concepts/rewriting.md", "picture of class", "words that people write in prompts"),
    ("docs/**", "pictures/", "the folder of the documentation's own images"),
    ("README.md", "pictures/", "the folder of the documentation's own images"),
]


def files():
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "src/valign").rglob("*.py"))


def offenders(text):
    """(line, what is written, what to write) for every banned word of ``text``."""
    for banned, better in BANNED.items():
        for match in re.finditer(rf"(?<![a-z])({banned})(?![a-z])", text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), better


def excused(name, text):
    """``text`` with what may stand in the file blanked out, and the entries that did."""
    used = [entry for entry in ALLOWED if fnmatch(name, entry[0]) and entry[1] in text]
    for _, allowed, _ in used:
        text = text.replace(allowed, " " * len(allowed))
    return text, used


def classes():
    """Name and file of every class of the package, without the underscore of private ones."""
    for path in sorted((ROOT / "src/valign").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield node.name.lstrip("_"), f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_banned_word():
    found, unused = [], set(ALLOWED)
    for path in files():
        name = str(path.relative_to(ROOT))
        text, used = excused(name, path.read_text())
        unused -= set(used)
        found += [f"{name}:{line}: {word!r}; write: {better}" for line, word, better in offenders(text)]
    assert not found, "\n".join(found)
    assert not unused, f"these entries of ALLOWED excuse nothing: {unused}"


def test_no_banned_class():
    found = [f"{place}: {name}; write: {BANNED_CLASSES[name]}" for name, place in classes() if name in BANNED_CLASSES]
    assert not found, "\n".join(found)


def test_no_two_classes_share_a_name():
    by_name = defaultdict(list)
    for name, place in classes():
        by_name[name.lower()].append(f"{name} ({place})")
    shared = [", ".join(places) for places in by_name.values() if len(places) > 1]
    assert not shared, "\n".join(shared)


@pytest.mark.parametrize(
    "text",
    [
        "two pictures",
        "n_pictures",
        "Peer",
        "an initialiser",
        "X is no model",
        "this\nis no\nmodel",
        "its safe twin",
        "a parked encoder",
    ],
)
def test_a_banned_word_is_found(text):
    assert list(offenders(text))


@pytest.mark.parametrize(
    "text",
    [
        "an image",
        "there is no model",
        "There are no models",
        "it is no longer there",
        "no more",
        "depicture",
        "speer",
        "winters",
        "is now",
    ],
)
def test_a_word_that_only_looks_like_one_is_not(text):
    assert not list(offenders(text))
