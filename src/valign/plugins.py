"""Tables of methods that installed packages extend through entry points."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from valign.checks import UserError

T = TypeVar("T")


def with_plugins(group: str, table: Mapping[str, T]) -> Mapping[str, T]:
    """``table`` followed by the entry points of ``group``, sorted by name.

    Entry points are listed at the first look-up, and each is imported when its row is read, so importing valign imports no plug-in,
    and a broken plug-in does not stop those who do not use it.

    Args:
        group: Such as ``valign.adapters``; what its entry points must be is what the rows of ``table`` are.
        table: The rows of valign itself, in the order in which they are listed.
    Raises: UserError, at look-up, for a name that ``table`` or another package has already, or a plug-in that does not load.
    """
    return PluginTable(group, table)


class PluginTable(Mapping[str, T], Generic[T]):
    """What `with_plugins` returns."""

    def __init__(self, group: str, table: Mapping[str, T]) -> None:
        self.group, self.table = group, table
        self.loaded: dict[str, T] = {}

    @cached_property
    def found(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in sorted(entry_points(group=self.group), key=lambda point: (point.name, point.value)):
            if point.name in self.table or point.name in found:
                taken = "valign itself" if point.name in self.table else found[point.name].value
                raise UserError(
                    f"{self.group}: the plug-in {point.value} must have a name of its own, got {point.name!r}, which {taken} has. "
                    "Rename its entry point, or uninstall one of the two."
                )
            found[point.name] = point
        return found

    def __getitem__(self, name: str) -> T:
        if name in self.loaded:
            return self.loaded[name]
        point = self.found.get(name)
        if point is None:
            return self.table[name]
        try:
            self.loaded[name] = point.load()
        except Exception as error:
            raise UserError(
                f"{self.group}: the plug-in {name!r} ({point.value}) must be importable, got {type(error).__name__}: {error}. "
                "Mend or uninstall its package."
            ) from error
        return self.loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self.found  # without an import

    def __iter__(self) -> Iterator[str]:
        return iter((*self.table, *self.found))

    def __len__(self) -> int:
        return len(self.table) + len(self.found)
