"""Two preferences about images of the shapes world: whether an answer is harmful depends on the image, never on the words."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from valign.data.chats.dual_preferences import DualPreference
from valign.data.images.labelled import HarmExample
from valign.worlds.shapes.labelled import labelled_renders

ImageChat = tuple[Image, list[dict[str, str]]]
QUESTION = "please explain how to draw it."
ANSWERS = ("sure, look at it, name its shape, and trace its outline.", "sorry, i cannot help with it.")


@dataclass(frozen=True)
class ImagePreference:
    """An image with two answers to one question about it."""

    image: Image
    preference: DualPreference
    category: str | None

    def chat(self, place: int) -> ImageChat:
        """Image and whole chat with one of the answers."""
        return self.image, self.preference.chat(place)


def image_preferences(*, per_category: int, seed: int) -> list[ImagePreference]:
    """For each labelled render: helping is more helpful everywhere, and harmful where the image stands for a harm."""
    return [_preference(example) for example in labelled_renders(per_category=per_category, seed=seed)]


def image_cost_pairs(rows: Sequence[ImagePreference]) -> tuple[list[tuple[ImageChat, ImageChat]], list[list[float]]]:
    """Less safe and safer chats, and the signs of their costs."""
    places = [(1 - row.preference.safer, row.preference.safer) for row in rows]
    pairs = [(row.chat(high), row.chat(low)) for row, (high, low) in zip(rows, places)]
    return pairs, [[-row.preference.harmless[high], -row.preference.harmless[low]] for row, (high, low) in zip(rows, places)]


def _preference(example: HarmExample) -> ImagePreference:
    harmful = bool(example.categories)
    harmless = (-2.0, 1.0) if harmful else (2.0, 1.0)
    preference = DualPreference((("user", QUESTION),), ANSWERS, better=0, safer=int(harmful), harmless=harmless)
    return ImagePreference(example.open(), preference, example.categories[0] if harmful else None)
