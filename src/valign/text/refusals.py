"""Whether a text reads like a refusal: the assistant says, at the start of a clause, that it will not do this. A weak signal."""

import re
from collections.abc import Collection

OPENINGS = (
    r"i(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid)",
    r"(?:i apologi[sz]e|my apologies|sorry)\b",
    r"i (?:can(?:no|')t|can not|could not|couldn't|will not|won't|must not|refuse|decline|do not help|don't help)\b",
    r"i(?:'d| would) rather not\b",
    r"i must (?:refuse|decline)\b",
    r"as an ai\b",
    r"unfortunately,? i\b",
    r"(?:no, i|that is something i) (?:can(?:no|')t|will not|won't|do not|don't)\b",
    r"(?:this|that|it) is not something (?:that )?i (?:can|will|am able to)\b",
)
CLAUSE = re.compile(r"(?:[.!?:;,\n]|\bbut\b|\bhowever\b|\btherefore\b|\bso\b)\s*")
STYLE = str.maketrans({"’": "'", "‘": "'", "*": "", "_": "", "#": "", ">": "", '"': "", "“": "", "”": ""})


def reads_as_refusal(text: str, more: Collection[str] = ()) -> bool:
    """Whether a clause of the text opens as a refusal does.

    Args:
        more: Further openings, as plain words of any case; for other languages, and a model's own wordings.
    """
    plain = " ".join(text.translate(STYLE).casefold().split(" "))
    clauses = [clause.strip() for clause in [plain, *CLAUSE.split(plain)]]
    known = re.compile("|".join([*OPENINGS, *(re.escape(words.translate(STYLE).casefold().strip()) for words in more)]))
    return any(known.match(clause) for clause in clauses if clause)
