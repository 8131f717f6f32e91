"""`detector.json`: which kind of detector a folder holds, its options, its card, and what was measured of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.files import read_json, write_json
from valign.interfaces import DetectorCard

FILE = "detector.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DetectorRecord:
    """What stands in `detector.json`. ``measured`` is empty where nobody measured the detector's error."""

    kind: str  # a row of `valign.detectors.DETECTORS`
    card: DetectorCard
    options: Mapping[str, Any] = field(default_factory=dict)  # as the kind reads them
    measured: Mapping[str, Any] = field(default_factory=dict)  # ``images``: on which; ``categories``: counts, see `CategoryError`
    made: Mapping[str, Any] = field(default_factory=dict)  # from what, with which seed and versions

    def card_for(self, folder: Path, weights_sha256: str) -> DetectorCard:
        """The card, if the weights are still the recorded ones. Raises: UserError if not: its error would be another's."""
        if weights_sha256 != self.card.weights_sha256:
            raise UserError(
                f"{folder} must hold the weights that {FILE} describes ({self.card.weights_sha256[:12]}), got "
                f"{weights_sha256[:12]}. "
                "Restore them, or fit or import the detector again."
            )
        return self.card


def read_record(folder: Path) -> DetectorRecord:
    """Raises: UserError if there is none, or if it is broken or of a later version."""
    path = folder / FILE
    if not path.is_file():
        holds = "it is empty" if folder.is_dir() and not any(folder.iterdir()) else f"it has no {FILE}"
        raise UserError(
            f"{folder} must be a detector's folder, {holds if folder.is_dir() else 'it does not exist'}. "
            "Make one with `valign detector fit` or `valign detector import`."
        )
    values = read_json(path)
    try:
        if values["version"] > VERSION:
            raise UserError(f"{path} was written by a later version of valign ({values['version']}). Update valign.")
        plain = values["card"]
        card = DetectorCard(**plain | {name: tuple(plain[name]) for name in ("classes", "domain")})
        parts = {name: dict(values.get(name, {})) for name in ("options", "measured", "made")}
        return DetectorRecord(kind=str(values["kind"]), card=card, **parts)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a detector ({error}). Fit or import the detector again.") from error


def write_record(folder: Path, record: DetectorRecord) -> None:
    """Write `detector.json` atomically."""
    write_json(folder / FILE, {"version": VERSION, **asdict(record)})


def with_errors(record: DetectorRecord, measured: Mapping[str, Any], card: DetectorCard) -> DetectorRecord:
    """The record with an error measured anew."""
    return replace(record, measured=measured, card=card)
