"""One spelling for the category names of public data sets."""

import re
from collections.abc import Collection

from valign.checks import UserError, close_to

CATEGORY_IDS = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal-activity")
_OTHER_SPELLINGS = {
    "harrasment": "harassment",  # CoProV2
    "harrassment": "harassment",
    "harasment": "harassment",
    "selfharm": "self-harm",
    "sexual-content": "sexual",
    "illegal": "illegal-activity",
    "illegal-activities": "illegal-activity",
    "hateful": "hate",
    "violent": "violence",
    "shocking-images": "shocking",
}


def normalize_category(text: str, known: Collection[str] | None = None) -> str:
    """``"Harrasment"`` -> ``"harassment"``, ``"Illegal Activity"`` -> ``"illegal-activity"``, ``""`` -> ``""``.

    A name of no known set becomes an id of the same form (``"Brand Misuse"`` -> ``"brand-misuse"``), since a policy may have
    categories of its own. Pass ``known`` (`Policy.category_ids`) to refuse what the policy lacks.

    Raises: UserError if ``known`` is given and lacks the name.
    """
    slug = "-".join(re.findall(r"[^\W_]+", text.casefold()))
    name = _OTHER_SPELLINGS.get(slug, slug)
    if known is not None and name not in known:
        guess = close_to(slug, known)
        raise UserError(f"category must be one of {', '.join(known)}; got {text!r}.{guess} Add it to the policy, or drop the row.")
    return name
