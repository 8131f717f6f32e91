"""What an image model is told by a prompt as people type it: the record that every dialect gives."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from valign.text.syntax.traced import Traced, distinct, joined

Wildcards = Mapping[str, Sequence[str]]  # name -> lines of the list
NAME = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Seen:
    """Texts that condition the image at some time or place, texts that it is pushed away from, names of files, unread lists."""

    texts: tuple[Traced, ...]
    negative: tuple[Traced, ...] = ()
    names: tuple[Traced, ...] = ()
    unread: tuple[str, ...] = field(default=())  # lists of words that were asked for and not given

    def all_texts(self) -> list[Traced]:
        """What has to be judged: the texts, and the words of names. What the image is pushed away from is not shown."""
        return distinct([*self.texts, *map(words_of_name, self.names)])


Dialect = Callable[[Traced, Wildcards], Seen]


def words_of_name(name: Traced) -> Traced:
    """``dragon_v2`` as ``dragon v``: signs and digits part words."""
    return joined((name[slice(*match.span())] for match in NAME.finditer(name.text)), " ")


def together(found: Iterable[Seen]) -> Seen:
    """All of them as one."""
    every = list(found)
    return Seen(
        tuple(distinct([one for seen in every for one in seen.texts])),
        tuple(distinct([one for seen in every for one in seen.negative])),
        tuple(distinct([one for seen in every for one in seen.names])),
        tuple(dict.fromkeys(name for seen in every for name in seen.unread)),
    )
