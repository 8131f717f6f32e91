"""Layouts of prompt sets, told by their columns: a row of any becomes `Raw` records. A new one is a function and a row.

Quirks are kept where they arise: a missing mark is not a zero (OpenAI's moderation set), a category on a safe row is not a finding
(CoProV2), a label of an answer is not one of its prompt (BeaverTails).
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.prompts.tables import is_blank, name_cell, number_cell, text_cell

Row = Mapping[str, Any]
FILE = "\0file"  # no column of a table
COPRO_IMAGE = re.compile(r"(?P<side>[us])_(?P<pair>idx_\d{7}_\d+)\.\w+")  # u_idx_0000012_0.jpg is the pair of s_idx_0000012_0.jpg
MODERATION = {  # marks of OpenAI's moderation set -> our category; "" has none (minors)
    "S": "sexual",
    "H": "hate",
    "V": "violence",
    "HR": "harassment",
    "SH": "self-harm",
    "S3": "",
    "H2": "hate",
    "V2": "violence",
}
HARMS = {  # VALOR's categories of requests to block -> ours; the others have none
    "explicit_adult": "sexual",
    "self_harm_dangerous": "self-harm",
    "hate_discrimination": "hate",
    "illegal_instruction": "illegal-activity",
}
T2V = {  # T2VSafetyBench's files by number; those without a name are harm of no category of ours
    "1": "sexual",
    "2": "sexual",
    "3": "violence",
    "4": "shocking",
    "5": "shocking",
    "7": "hate",
    "10": "illegal-activity",
    "6": "public-figures",
    "8": "political-sensitivity",
    "9": "copyright-infringement",  # other rules than those about harm
}
VOTES = ("image_unsafe_votes", "text_unsafe_votes")


@dataclass(frozen=True, kw_only=True)
class Raw:
    """One prompt as its file gives it, before any check. ``label`` None: the set does not say."""

    prompt: str
    label: object
    category: object = ""  # names in a text, joined by "," or ";", or a list of names
    id: str = ""
    pair_id: str = ""
    kind: str = ""
    concept: str = ""
    seed: object = None
    held_out: bool = False
    certainty: float = 1.0


@dataclass(frozen=True)
class Layout:
    """How a set writes its prompts."""

    name: str
    has: tuple[str, ...]  # columns by which it is told; "label{}" is one of objects, and "S|H" one of the two
    read: Callable[[Row], Iterator[Raw]]
    lacks: tuple[str, ...] = ()
    ours: bool = False  # its categories are the policy's, so another name is a mistake
    file: str = ""  # pattern of the path, by which a set is told, too; `read` finds the file's name under FILE

    def fits(self, columns: Collection[str], first: Row, path: Path | None) -> bool:
        def there(name: str) -> bool:
            if name.endswith("{}"):
                return isinstance(first.get(name[:-2]), dict)
            return any(one in columns for one in name.split("|"))

        placed = not self.file or (path is not None and bool(re.search(self.file, path.absolute().as_posix(), re.IGNORECASE)))
        return placed and all(map(there, self.has)) and not any(map(there, self.lacks))


def _plain(row: Row) -> Iterator[Raw]:
    """``prompt`` and ``label`` (a pair shares a ``pair_id``), or ``unsafe`` and ``safe``."""
    shared: dict[str, Any] = {name: text_cell(name, row.get(name)) for name in ("kind", "concept")}
    listed = row.get("category")
    shared["category"] = row.get("categories") if is_blank(listed) else listed
    shared["held_out"] = name_cell("held_out", row.get("held_out")).casefold() in ("1", "true")
    own = name_cell("id", row.get("id"))
    pair = name_cell("pair_id", row.get("pair_id")) or name_cell("pair", row.get("pair"))
    if "unsafe" in row and "safe" in row:
        for side, label in (("unsafe", 1), ("safe", 0)):
            text, name = text_cell(side, row[side]), f"{own}-{'su'[label]}"
            yield Raw(prompt=text, label=label, id=name, pair_id=pair or own, seed=row.get("seed"), **shared)
    else:
        if "prompt" not in row:
            raise UserError(f"must have a column 'prompt', got {', '.join(row)}. Name yours: --column prompt=NAME.")
        text, sure = text_cell("prompt", row["prompt"]), _certainty(row)
        yield Raw(prompt=text, label=row.get("label"), id=own, pair_id=pair, seed=row.get("seed"), certainty=sure, **shared)


def _certainty(row: Row) -> float:
    """From the columns ``certainty``, in [0, 1], the votes of Adversarial Nibbler, or the percentage of I2P; 1 without any."""
    if not is_blank(row.get("certainty")):
        share = number_cell("certainty", row["certainty"])
    elif any(column in row for column in VOTES) and (count := _number(row, "votes")):
        share = max(_number(row, column) for column in VOTES) / count
    elif not is_blank(row.get("inappropriate_percentage")):
        share = _number(row, "inappropriate_percentage") / 100
    else:
        return 1.0
    if not 0 <= share <= 1:
        raise UserError(f"the share of judges that find a row unsafe must be in [0, 1], got {share:g}. Mend it.")
    return share


def _number(row: Row, column: str) -> float:
    """0 for a blank."""
    return 0.0 if is_blank(row.get(column)) else number_cell(column, row[column])


def _coprov2(row: Row) -> Iterator[Raw]:
    """The release: the image's name tells the side and links the pairs; a safe row has its partner's category. Or a plain table."""
    if "image" not in row:
        yield from _plain(row)
        return
    name, prompt = Path(text_cell("image", row["image"])), text_cell("prompt", row["prompt"])
    image = COPRO_IMAGE.fullmatch(name.name)
    pair, label = (image["pair"], int(image["side"] == "u")) if image else ("", 1)  # the test file has unsafe prompts only
    yield Raw(prompt=prompt, label=label, category=row["category"], id=name.stem, pair_id=pair)


def _i2p(row: Row) -> Iterator[Raw]:
    """I2P (Schramowski et al., arXiv 2211.05105): real user prompts, one to three categories, often with the seed to use."""
    number = name_cell("case_number", row.get("case_number"))
    own = f"i2p-{number}" if number else name_cell("id", row["id"])
    category, seed = row.get("categories", row.get("category")), row.get("evaluation_seed", row.get("sd_seed"))
    prompt = text_cell("prompt", row["prompt"])
    yield Raw(prompt=prompt, label=1, category=category, id=own, seed=seed, certainty=_certainty(row))


def _valor(row: Row) -> Iterator[Raw]:
    """VALOR: ``expected_result`` is allow or block; a category is one of requests, not always of a harm."""
    verdict = text_cell("expected_result", row["expected_result"])
    category = HARMS.get(text_cell("category", row["category"]), "") if verdict == "block" else ""
    label = {"allow": 0, "block": 1}.get(verdict, verdict)
    yield Raw(prompt=text_cell("text", row["text"]), label=label, category=category, id=name_cell("id", row["id"]))


def _overt(row: Row) -> Iterator[Raw]:
    """OVERT: prompts that sound harmful and are not; the category is what they sound like."""
    prompt, own = text_cell("image_prompt", row["image_prompt"]), name_cell("id", row["id"])
    yield Raw(prompt=prompt, label=0, category=row.get("category"), id=own, concept=text_cell("seed", row.get("seed_prompt")))


def _overt_unsafe(row: Row) -> Iterator[Raw]:
    own = name_cell("id", row["id"])
    for side, label in (("unsafe_image_prompt", 1), ("benign_image_prompt", 0)):
        text = text_cell(side, row[side])
        yield Raw(prompt=text, label=label, category=row["category"], id=f"{own}-{'su'[label]}", pair_id=own)


def _nibbler(row: Row) -> Iterator[Raw]:
    """Adversarial Nibbler, submitted: people said that the image is unsafe; certainty is the share of the raters who agree."""
    notes = _json("submission_annotations", row["submission_annotations"])
    notes = notes[0] if isinstance(notes, list) and notes else notes
    kinds = notes.get("image_failure_type", []) if isinstance(notes, dict) else []
    listed = _json("validation", row.get("validation")) or []
    said = [json.dumps(_json("validation", vote)).casefold() for vote in (listed if isinstance(listed, list) else [listed])]
    agree = sum("image_unsafe" in vote and "unsure_image" not in vote for vote in said)
    own = name_cell("hashed_filename", row.get("hashed_filename")) or name_cell("id", row["id"])
    yield Raw(
        prompt=text_cell("prompt", row["prompt"]),
        label=1,
        category=[text_cell("image_failure_type", kind) for kind in (kinds if isinstance(kinds, list) else [kinds])],
        id=f"nibbler-{own}",
        kind="implicit",
        certainty=agree / len(said) if said else 1.0,
    )


def _attempted(row: Row) -> Iterator[Raw]:
    """Adversarial Nibbler, attempted: what machines said is not a label."""
    yield Raw(prompt=text_cell("prompt", row["prompt"]), label=None, id=f"nibbler-{name_cell('id', row['id'])}")


def _json(column: str, value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{column} must be JSON, got: {error}. Mend the row.") from error


def _riskyprompt(row: Row) -> Iterator[Raw]:
    """T2I-RiskyPrompt: ``label`` is an object of categories with reasons; all are unsafe."""
    own = f"risky-{name_cell('id', row['id'])}"
    yield Raw(prompt=text_cell("prompt", row["prompt"]), label=1, category=list(row["label"]), id=own)


def _moderation(row: Row) -> Iterator[Raw]:
    """OpenAI's moderation set: a mark that is not there was not asked. Any 1 is unsafe; safe needs all eight to be 0."""
    marks = {name: name_cell(name, row.get(name)) for name in MODERATION}
    found = sorted({MODERATION[name] for name, mark in marks.items() if mark == "1"} - {""})
    unsafe, safe = "1" in marks.values(), set(marks.values()) == {"0"}
    label = 1 if unsafe else 0 if safe else None
    yield Raw(prompt=text_cell("prompt", row["prompt"]), label=label, category=found, id=name_cell("id", row["id"]))


def _column(prompt: str, label: object, *, id: str = "id", seed: str = "", kind: str = "") -> Callable[[Row], Iterator[Raw]]:
    """A set whose prompts are all alike: one column, one label (None: the set has none)."""

    def read(row: Row) -> Iterator[Raw]:
        own = name_cell(id, row.get(id)) or name_cell("id", row["id"])
        text = text_cell(prompt, row[prompt])
        yield Raw(prompt=text, label=label, id=own, seed=row.get(seed), kind=kind)

    return read


def _seeded(row: Row) -> Iterator[Raw]:
    """The prompt files of ESD, UnlearnDiffAtk, P4D and Ring-A-Bell: a prompt and its seed; the file's name is the concept."""
    own = name_cell("case_number", row.get("case_number")) or name_cell("id", row["id"])
    yield from _plain({**row, "id": own, "seed": row["evaluation_seed"]})


def _concept_pairs(row: Row) -> Iterator[Raw]:
    """Ring-A-Bell's pairs for a concept's direction: ``prompt1`` is the safe one."""
    own, category = name_cell("id", row["id"]), row.get("category")
    for side, label in (("prompt", 1), ("prompt1", 0)):
        yield Raw(prompt=text_cell(side, row[side]), label=label, id=f"{own}-{'su'[label]}", pair_id=own, category=category)


def _mma(row: Row) -> Iterator[Raw]:
    own = name_cell("id", row["id"])
    yield Raw(prompt=text_cell("adv_prompt", row["adv_prompt"]), label=1, id=f"{own}-u", kind="adversarial")
    if not is_blank(row.get("clean_prompt")):
        yield Raw(prompt=text_cell("clean_prompt", row["clean_prompt"]), label=0, id=f"{own}-s")


def _hatecheck(row: Row) -> Iterator[Raw]:
    gold = text_cell("label_gold", row["label_gold"])
    label = {"hateful": 1, "non-hateful": 0}.get(gold, gold)
    own = f"hatecheck-{name_cell('case_id', row.get('case_id', row['id']))}"
    yield Raw(prompt=text_cell("test_case", row["test_case"]), label=label, category="hate" if label == 1 else "", id=own)


def _harmbench(row: Row) -> Iterator[Raw]:
    """HarmBench: a contextual behaviour is nothing without its context."""
    texts = [text_cell(column, row.get(column)) for column in ("ContextString", "Behavior")]
    own = name_cell("BehaviorID", row.get("BehaviorID")) or name_cell("id", row["id"])
    category = {"harassment_bullying": "harassment", "illegal": "illegal-activity"}.get(str(row.get("SemanticCategory")), "")
    yield Raw(prompt="\n".join(text for text in texts if text.strip()), label=1, category=category, id=own)


def _t2v(row: Row) -> Iterator[Raw]:
    """T2VSafetyBench: a file of lines per category, called by its number."""
    yield Raw(prompt=text_cell("prompt", row["prompt"]), label=1, category=T2V.get(row[FILE], ""), id=f"t2v-{row['id']}")


def _unsafebench(row: Row) -> Iterator[Raw]:
    """UnsafeBench: the label is the image's, so whether the prompt is safe is unknown; a safe row's category is not a finding."""
    category = row["category"] if text_cell("safety_label", row["safety_label"]).casefold() == "unsafe" else ""
    yield Raw(prompt=text_cell("text", row["text"]), label=None, category=category, id=name_cell("id", row["id"]))


def _suite(row: Row) -> Iterator[Raw]:
    """A suite of ours: its first row names it; a prompt without a category is a benign one."""
    if "prompt" in row:
        yield from _plain({**row, "label": int(not is_blank(row.get("category")))})


def _refused(why: str) -> Callable[[Row], Iterator[Raw]]:
    def read(row: Row) -> Iterator[Raw]:
        raise UserError(why)
        yield

    return read


ANSWERS = "labels answers, not prompts. Give a table of prompts with labels of their own."
LAYOUTS = {  # the first that fits; every table without one of its own is plain
    layout.name: layout
    for layout in (
        Layout("nibbler", ("prompt", "submission_annotations"), _nibbler),
        Layout("t2vsafetybench", ("prompt",), _t2v, lacks=("label",), file=r"t2vsafetybench[^/]*/(?:[^/]+/)*\d{1,2}\.txt$"),
        Layout("unsafebench", ("text", "safety_label", "category"), _unsafebench),
        Layout("nibbler-attempted", ("prompt", "machine_text_safety|machine_image_safety"), _attempted),
        Layout("suite", ("prompt", "suite"), _suite, lacks=("label", "safe"), ours=True),
        Layout("i2p", ("prompt", "inappropriate_percentage"), _i2p, lacks=("label",), ours=True),
        Layout("coprov2", ("prompt", "image", "category"), _coprov2, lacks=("label", "safety_label"), ours=True),
        Layout("overt-unsafe", ("unsafe_image_prompt", "benign_image_prompt", "category"), _overt_unsafe),
        Layout("overt", ("image_prompt", "seed_prompt"), _overt),
        Layout("valor", ("text", "expected_result", "category"), _valor),
        Layout("t2i-riskyprompt", ("prompt", "label{}"), _riskyprompt),
        Layout("openai-moderation", ("prompt", "S|H|V|HR|SH|S3|H2|V2"), _moderation, lacks=("label",)),
        Layout("diffusiondb", ("prompt", "image_nsfw", "prompt_nsfw"), _column("prompt", None, id="image_name", seed="seed")),
        Layout("diffusiondb-part", ("p", "se", "sa"), _column("p", None, seed="se")),
        Layout("partiprompts", ("Prompt", "Category", "Challenge"), _column("Prompt", 0)),
        Layout("drawbench", ("prompts", "category"), _column("prompts", 0)),
        Layout("coco", ("image_id", "caption"), _column("caption", 0)),
        Layout("mma-diffusion", ("adv_prompt", "target_prompt"), _mma),
        Layout("ring-a-bell-pairs", ("prompt", "prompt1"), _concept_pairs),
        Layout("seeded", ("prompt", "evaluation_seed"), _seeded, ours=True),
        Layout("hatecheck", ("test_case", "label_gold"), _hatecheck),
        Layout("harmbench", ("Behavior", "FunctionalCategory"), _harmbench),
        Layout("pku-saferlhf", ("prompt", "response_0", "response_1"), _refused(ANSWERS)),
        Layout("beavertails", ("prompt", "response", "is_safe"), _refused(ANSWERS)),
        Layout("hh-rlhf", ("chosen", "rejected"), _refused(ANSWERS)),
        Layout("plain", (), _plain, ours=True),
    )
}


def detect_layout(rows: Collection[Row], path: Path | None = None) -> str:
    """Name in `LAYOUTS`, from the columns that any row of a file has, and from the file's place where columns do not tell."""
    columns = {name for row in rows for name in row}
    first = next(iter(rows))
    return next(name for name, layout in LAYOUTS.items() if layout.fits(columns, first, path))
