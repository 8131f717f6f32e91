"""The model card beside an adapter, ``README.md``: what it is, of which base, how it was made, what was measured, how to load it.

Valid as a card of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards): YAML front matter, then Markdown.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from valign.checks import UserError
from valign.files import write_text

CARD = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FINETUNE = "finetune"  # recipe in the record of an adapter that was trained on somebody's own data
START, END = "<!-- measured: start -->", "<!-- measured: end -->"
UNMEASURED = "Nothing was measured yet. `valign evaluate` measures harm, benign fidelity and drift beside the base model."
FACTS = {  # key of the record: row of the card
    "base": "base model",
    "base_fingerprint": "fingerprint of the base",
    "family": "family",
    "category": "category",
    "policy": "policy",
    "policy_hash": "fingerprint of the policy",
    "data": "fingerprint of the data",
    "pairs": "training pairs",
    "rows": "training rows",
}
CAUTION = """An adapter lowers the chance of harmful images; it does not exclude them. Measure it on your own prompts before you
rely on it."""
TUNED = (  # of a fine-tuning that no objective held
    "Fine-tuning may undo what keeps the base model, or an adapter beside this one, safe. `valign check` says whether it did."
)
PAGE = """---
{front}---

# {title}

{what}

| | |
|---|---|
{facts}

## Measured

{start}
{measured}
{end}

{caution}

## Load it

```python
{load}
```

## Licence

What an adapter may be used for follows from the licence of its base model and of the data it was trained on; valign adds no terms.

## How it was made

```yaml
{record}```
"""


def adapter_card(
    record: Mapping[str, Any], *, name: str, load: str, library: str = "diffusers", facts: Mapping[str, str] | None = None
) -> str:
    """The card's text.

    Args:
        record: The adapter's provenance, without paths of the machine; see `save_adapter`.
        name: Of the adapter, e.g. its folder's.
        load: Python that loads it.
        library: Of the hub: ``diffusers`` or ``peft``.
        facts: Further rows of the table.
    """
    image = library == "diffusers"
    tuned = record.get("recipe") == FINETUNE and "preserve" not in record.get("options", {})
    tags = ["valign", *([] if tuned else ["safety"]), "lora", *(["text-to-image"] if image else [])]
    front: dict[str, Any] = {"library_name": library, **({"pipeline_tag": "text-to-image"} if image else {}), "tags": tags}
    base = str(record.get("base", ""))
    if HUB_ID.fullmatch(base):
        front |= {"base_model": base, "base_model_relation": "adapter"}
    rows = {row: _cell(record[key]) for key, row in FACTS.items() if record.get(key)} | _of_merge(record) | dict(facts or {})
    return PAGE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=name,
        what=_what(record),
        facts="\n".join(f"| {row} | {value} |" for row, value in rows.items()),
        start=START,
        measured=UNMEASURED,
        caution=TUNED if tuned else CAUTION,
        end=END,
        load=load,
        record=yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True),
    )


def write_measured(folder: Path, text: str) -> None:
    """Put what was measured into the card in ``folder``, in the place of what stood there.

    Raises: UserError if the card was edited so that the place is gone.
    """
    path = folder / CARD
    card = path.read_text(encoding="utf-8")
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"{path} must hold the lines {START} and {END}, between which figures go. Put them back.")
    changed = f"{before}{START}\n{text.strip()}\n{END}{after}"
    if changed != card:
        write_text(path, changed)


def _what(record: Mapping[str, Any]) -> str:
    if "merge_method" in record:
        names = ", ".join(str(source["name"]) for source in record.get("sources", []))
        return f"A LoRA adapter: {record['merge_method']} of {names}, merged by valign."
    made = record.get("recipe") or record.get("method") or "LoRA"
    purpose = f" for {record['category']}" if "category" in record else ""
    return f"A LoRA adapter{purpose}, made by valign ({made})."


def _of_merge(record: Mapping[str, Any]) -> dict[str, str]:
    """Rows of a merge: its experts' categories and weights, and what the merge itself was told."""
    if "merge_method" not in record:
        return {}
    sources = record.get("sources", [])
    rows = {
        "categories": list(dict.fromkeys(one["category"] for one in sources if "category" in one)),
        "weights": [f"{one['name']} {one['weight']:g}" for one in sources if "weight" in one],
        "options": [f"{name} {value}" for name, value in record.get("options", {}).items()],
    }
    return {name: _cell(row) for name, row in rows.items() if row}


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|")
