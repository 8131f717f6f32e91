"""Is this image harmful, and how? One interface, used by the guard and by the evaluation, and one table to build from."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path

from valign.checks import UserError
from valign.detectors.any_of import AnyOf
from valign.detectors.base import flagged, measure_error
from valign.detectors.clip_probe import ClipProbeDetector
from valign.detectors.hysac import HysacDetector
from valign.detectors.image_classifier import ImageClassifierDetector
from valign.detectors.nudenet import NudeNetDetector
from valign.detectors.oracle import OracleDetector
from valign.detectors.record import FILE, read_record
from valign.detectors.safety_checker import SafetyCheckerDetector
from valign.detectors.vision_judge import VisionJudge
from valign.interfaces import Detector, DetectorCard, scores_of
from valign.plugins import with_plugins

DETECTORS: Mapping[str, Callable[..., Detector]] = with_plugins(
    "valign.detectors",
    {
        "nudenet": NudeNetDetector,
        "safety-checker": SafetyCheckerDetector,
        "clip-probe": ClipProbeDetector,
        "image-classifier": ImageClassifierDetector,
        "vision-judge": VisionJudge,
        "hysac": HysacDetector,
        "world-oracle": OracleDetector,
    },
)  # each is called with the folder it reads, or with nothing where its first parameter has a default
SHELF = "VALIGN_DETECTORS"  # environment variable: the folder whose sub-folders are detectors that are called by name alone
ENDPOINT = re.compile(r"(?P<place>.+?)@(?P<address>https?://.+)")


def build(names: str | Sequence[str], *, oracle: Callable[[str], Detector | None] = lambda name: None) -> Detector:
    """The detector of this name: a kind of `DETECTORS`, as ``KIND`` or ``KIND=FOLDER``; a detector's folder, or its name on the
    shelf; a judge's with ``@ADDRESS`` of its endpoint behind it. Several, joined by ``+`` or in a sequence, are one `AnyOf`.

    Args: oracle: Name -> the oracle of a world, or None if the name means no world's.
    Raises: UserError for an unknown name, a folder that is missing or not wanted, and a judge without an endpoint.
    """
    listed = [names] if isinstance(names, str) else list(names)
    parts = [oracle(part) or _build(part) for name in listed for part in _parts(name)]
    return parts[0] if len(parts) == 1 else AnyOf(*parts)


def shelf() -> Path:
    """The folder whose sub-folders are detectors that are called by name alone."""
    return Path(os.environ.get(SHELF) or "detectors")


def find_folder(name: str) -> Path | None:
    """The detector's folder of this name: a path, or a sub-folder of the shelf; None if neither is one."""
    return next((place for place in (Path(name), shelf() / name) if name and (place / FILE).is_file()), None)


def on_shelf() -> list[Path]:
    """The detectors' folders on the shelf, by name."""
    return sorted(path.parent for path in shelf().glob(f"*/{FILE}"))


def _parts(name: str) -> list[str]:
    return [name] if find_folder(name.partition("@")[0]) else name.split("+")


def _build(part: str) -> Detector:
    found = ENDPOINT.fullmatch(part)
    name, options = (found["place"], {"endpoint": found["address"]}) if found else (part, {})
    kind, _, given = name.partition("=")
    folder: str | Path = given
    if kind not in DETECTORS and (place := find_folder(name)):
        kind, folder = read_record(place).kind, place
        if kind not in DETECTORS:
            raise UserError(
                f"{place / FILE} must name a kind of detector ({', '.join(DETECTORS)}), got {kind!r}. Install its package."
            )
    elif name and Path(name).is_dir() and kind not in DETECTORS:
        read_record(Path(name))  # says what is missing
    if kind not in DETECTORS or bool(folder) != _reads_folder(kind) or (not folder and "=" in name):
        raise UserError(_unknown(part))
    if options and "endpoint" not in signature(DETECTORS[kind]).parameters:
        raise UserError(f"detector {name} must be named without an endpoint, for it sends nothing; got {part!r}.")
    return DETECTORS[kind](*([folder] if folder else []), **options)


def _unknown(part: str) -> str:
    forms = ", ".join(f"{kind}=FOLDER" if _reads_folder(kind) else kind for kind in DETECTORS)
    own = ", ".join(place.name for place in on_shelf())
    return (
        f"detector must be oracle, {forms}, or a detector's folder, joined by + if several; got {part!r}."
        f" FOLDER holds a safety checker, or what `valign detector fit` and `import` make. In {shelf()}: {own or 'none'}."
    )


def _reads_folder(kind: str) -> bool:
    first = next(iter(signature(DETECTORS[kind]).parameters.values()), None)
    return first is not None and first.default is first.empty


__all__ = [
    "DETECTORS",
    "AnyOf",
    "ClipProbeDetector",
    "Detector",
    "DetectorCard",
    "HysacDetector",
    "ImageClassifierDetector",
    "NudeNetDetector",
    "OracleDetector",
    "SafetyCheckerDetector",
    "VisionJudge",
    "build",
    "find_folder",
    "flagged",
    "measure_error",
    "on_shelf",
    "scores_of",
    "shelf",
]
