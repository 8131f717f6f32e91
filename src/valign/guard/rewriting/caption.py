"""A caption in parts: medium ("oil painting of"), scene, place ("in a garden"), details after commas. By patterns alone."""

import re
from dataclasses import dataclass

MEDIUM = re.compile(
    r"^\s*(?:(?:please )?(?:generate|create|draw|make|design|show|paint)(?: me)? )?"
    r"((?:an?|the)?\s*(?:[\w-]+ ){0,3}?(?:photo|photograph|picture|image|painting|drawing|sketch|portrait|illustration|"
    r"watercolou?r|render|rendering|poster|etching|engraving|sculpture|still|scene|close[- ]up|shot|comic|mural|print)s? of )",
    re.IGNORECASE,
)
PLACE = re.compile(
    r"\b(?:in|on|at|near|under|beside|inside|behind|along|across|outside|through|above|below|around|between|next to|in front of)"
    r" (?:an?|the|his|her|their|its|some|front|[\w-]+)\b[^,;.]*$",
    re.IGNORECASE,
)
SUBJECT = re.compile(
    r"\b((?:an?|the|one|two|three|four|several|some|many|a group of|a crowd of)\s+)?(?:[\w-]+\s+){0,2}?"
    r"(man|woman|men|women|person|people|couple|lady|gentleman|king|queen|prince|princess|knight|soldier|soldiers|doctor|nurse|"
    r"farmer|fisherman|chef|teacher|worker|workers|actor|actress|singer|dancer|dancers|warrior|wizard|witch|robot|astronaut|cat|"
    r"dog|horse|cyborg|elf|fairy|samurai|pirate|nun|priest|monk|tourist|tourists|friends|crowd|visitors|figure)\b",
    re.IGNORECASE,
)
STAND_INS = re.compile(r"^(?:a person|a man|a woman|a couple|people|friends)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Caption:
    """``medium + scene + place``, then ``details`` joined by commas. Every part may be empty."""

    medium: str
    scene: str
    place: str
    details: tuple[str, ...]

    def text(self) -> str:
        head = " ".join(part.strip() for part in (self.medium, self.scene, self.place) if part.strip())
        return ", ".join(part for part in (head, *self.details) if part)


def parse_caption(prompt: str) -> Caption:
    """Split at commas, semicolons and full stops; medium and place come from the first part."""
    parts = [part.strip() for part in re.split(r"[,;]|\.(?:\s|$)", prompt) if part.strip()]
    first, details = (parts[0], tuple(parts[1:])) if parts else ("", ())
    medium = MEDIUM.match(first)
    scene = first[medium.end() :] if medium else first
    place = PLACE.search(scene)
    if place and not scene[: place.start()].strip():
        place = None
    return Caption(
        medium=medium[1].strip() if medium else "",
        scene=(scene[: place.start()] if place else scene).strip(),
        place=place[0].strip() if place else "",
        details=details,
    )


def subject_of(scene: str) -> str:
    """The first person or animal with its article, adjectives left out ("a woman"); "" without one."""
    match = SUBJECT.search(scene)
    if match is None:
        return ""
    article = (match[1] or "").strip()
    noun = match[2]
    if article.casefold() in ("a", "an"):
        article = "an" if noun[0].lower() in "aeiou" else "a"
    return f"{article} {noun}".strip()


def with_subject(safe: str, subject: str) -> str:
    """The safe scene with ``subject`` in place of a stand-in ("a person", "people") at its beginning."""
    return STAND_INS.sub(subject, safe, count=1) if subject else safe
