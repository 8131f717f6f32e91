"""The report's section on detectors that were joined: how far they agree, and the images on which they do not."""

from collections.abc import Mapping, Sequence

from valign.evaluation.agreement import Agreement
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.report.report import data_uri, label, percent
from valign.evaluation.report.sections import Section, ShownImage
from valign.evaluation.results import ImageResult
from valign.evaluation.suite import Suite
from valign.interfaces import EVERY_CATEGORY, DetectorCard

SHOWN = 12  # images per pair of detectors
HEADER = (
    "Cohen's kappa",
    "Images",
    "Both harmful",
    "Only the first",
    "Only the second",
    "Both harmless",
    "Judged alike",
    "No answer",
)
NOTE = (
    "Kappa is 1 for detectors that always agree and 0 for agreement by chance; brackets are 95 % intervals "
    "over prompts. Detectors are "
    "compared by the categories that both measure. An image counts as harmful above if any detector calls it so."
)


def agreement_sections(
    found: Sequence[Agreement],
    rows: Sequence[ImageResult],
    suite: Suite,
    folders: Mapping[str, ImageFolder],
    card: DetectorCard,
) -> list[Section]:
    """One section for the table, and one per pair that disagrees with the first `SHOWN` of its disputed images."""
    if not found:
        return []
    table = Section(
        title="Do the detectors agree?",
        text="Every pair of the joined detectors, on the same images.",
        header=HEADER,
        first="Detectors",
        rows=tuple((f"{one.first} and {one.second}", *_cells(one)) for one in found),
        note=NOTE,
    )
    by_name = {(row.system, row.id): row for row in rows}
    unsafe = {prompt.id: not prompt.benign for prompt in suite.prompts}
    return [table, *(_disputed(one, by_name, unsafe, folders, card) for one in found if one.disputed)]


def kappa_text(one: Agreement) -> str:
    """Kappa with its interval, or why there is none."""
    if not one.categories:
        return "no category in common"
    if one.kappa is None:
        return "no image in common" if not one.images else "not defined: both say the same of every image"
    return f"{one.kappa.value:.2f} [{one.kappa.low:.2f}, {one.kappa.high:.2f}]"


def _cells(one: Agreement) -> tuple[str, ...]:
    counts = (one.images, one.both, one.only_first, one.only_second, one.neither)
    alike = percent((one.both + one.neither) / one.images) if one.images else "–"
    return (kappa_text(one), *map(str, counts), alike, str(one.unscored))


def _disputed(
    one: Agreement,
    rows: Mapping[tuple[str, str], ImageResult],
    unsafe: Mapping[str, bool],
    folders: Mapping[str, ImageFolder],
    card: DetectorCard,
) -> Section:
    images = []
    for system, key in one.disputed[:SHOWN]:
        row = rows[system, key]
        lines = (f"{system}, {key}", *(_says(name, row, card) for name in (one.first, one.second)))
        images.append(ShownImage(source=data_uri(folders[system].open(key)), lines=lines, unsafe=unsafe[key] or bool(row.harmful)))
    measured = "any category" if EVERY_CATEGORY in one.categories else ", ".join(label(name) for name in one.categories)
    return Section(
        title=f"Where {one.first} and {one.second} disagree",
        text=f"The first {len(images)} of {len(one.disputed)} images, in the suite's order, judged by: {measured}.",
        images=tuple(images),
    )


def _says(name: str, row: ImageResult, card: DetectorCard) -> str:
    """The detector's highest class on this image."""
    own = {one: score for one, score in row.scores.items() if one.partition(":")[0] == name}
    best = max(own, key=lambda one: own[one])
    word = "harmful" if own[best] >= card.threshold else "harmless"
    return f"{name}: {word} ({best.partition(':')[2]} {own[best]:.2f})"
