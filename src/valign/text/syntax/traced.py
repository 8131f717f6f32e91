"""A text that knows where each of its characters stands in the prompt that it came from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Traced:
    """``origin[i]`` is the place in the prompt of ``text[i]``; of one that the prompt lacks, the place that it stands for."""

    text: str
    origin: tuple[int, ...]

    @classmethod
    def of(cls, prompt: str) -> "Traced":
        return cls(prompt, tuple(range(len(prompt))))

    @classmethod
    def made(cls, text: str, place: int) -> "Traced":
        """A text that the prompt lacks, in the stead of what stands at ``place``."""
        return cls(text, (place,) * len(text))

    def __getitem__(self, part: slice) -> "Traced":
        return Traced(self.text[part], self.origin[part])

    def without(self, pattern: re.Pattern[str]) -> "Traced":
        """What is left when every match is cut out."""
        kept, last = [], 0
        for match in pattern.finditer(self.text):
            kept.append(slice(last, match.start()))
            last = match.end()
        return self if not kept else joined([self[part] for part in [*kept, slice(last, None)]])

    def split(self, pattern: re.Pattern[str]) -> list["Traced"]:
        """The parts between the matches."""
        parts, last = [], 0
        for match in pattern.finditer(self.text):
            parts.append(self[last : match.start()])
            last = match.end()
        return [*parts, self[last:]]

    def stripped(self) -> "Traced":
        start = len(self.text) - len(self.text.lstrip())
        return self[start : len(self.text.rstrip())] if self.text.strip() else self[:0]


def joined(parts: Iterable[Traced], between: str = "") -> Traced:
    """The parts one behind the other."""
    texts: list[str] = []
    origins: list[int] = []
    for part in parts:
        if between and texts:
            texts.append(between)
            origins += (part.origin[0] if part.origin else origins[-1] if origins else 0,) * len(between)
        texts.append(part.text)
        origins += part.origin
    return Traced("".join(texts), tuple(origins))


def distinct(texts: Sequence[Traced]) -> list[Traced]:
    """The first of those that read the same, spaces aside; none that is blank."""
    found: dict[str, Traced] = {}
    for one in texts:
        if key := " ".join(one.text.split()):
            found.setdefault(key, one)
    return list(found.values())
