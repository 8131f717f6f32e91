"""Is this image harmful, and how? One interface, used by the guard and by the evaluation, and one table to build from."""

from collections.abc import Callable, Mapping
from inspect import signature

from valign.checks import UserError
from valign.detectors.any_of import AnyOf
from valign.detectors.base import flagged, measure_error
from valign.detectors.clip_probe import ClipProbeDetector
from valign.detectors.nudenet import NudeNetDetector
from valign.detectors.oracle import OracleDetector
from valign.detectors.safety_checker import SafetyCheckerDetector
from valign.interfaces import Detector, DetectorCard, scores_of
from valign.plugins import with_plugins

DETECTORS: Mapping[str, Callable[..., Detector]] = with_plugins(
    "valign.detectors",
    {"nudenet": NudeNetDetector, "safety-checker": SafetyCheckerDetector, "clip-probe": ClipProbeDetector},
)  # each is called with the folder it reads, or with nothing where its first parameter has a default


def build(name: str, *, oracle: Callable[[str], Detector | None] = lambda name: None) -> Detector:
    """The detector called ``name``: a kind of `DETECTORS`, as ``KIND`` or ``KIND=FOLDER``; several joined by ``+`` are one `AnyOf`.

    Args: oracle: Name -> the oracle of a world, or None if the name means no world's.
    Raises: UserError for an unknown kind, and for a folder that is missing or not wanted.
    """
    parts = []
    for part in name.split("+"):
        kind, _, folder = part.partition("=")
        found = oracle(part)
        if found is None and (kind not in DETECTORS or bool(folder) != _reads_folder(kind) or (not folder and "=" in part)):
            forms = ", ".join(f"{kind}=FOLDER" if _reads_folder(kind) else kind for kind in DETECTORS)
            raise UserError(
                f"detector must be oracle, {' or '.join(forms.rsplit(', ', 1))}, joined by + if several; got {part!r}."
                " FOLDER holds a safety checker, or a CLIP model and its probe.safetensors."
            )
        parts.append(found or DETECTORS[kind](*([folder] if folder else [])))
    return parts[0] if len(parts) == 1 else AnyOf(*parts)


def _reads_folder(kind: str) -> bool:
    first = next(iter(signature(DETECTORS[kind]).parameters.values()), None)
    return first is not None and first.default is first.empty


__all__ = [
    "DETECTORS",
    "AnyOf",
    "ClipProbeDetector",
    "Detector",
    "DetectorCard",
    "NudeNetDetector",
    "OracleDetector",
    "SafetyCheckerDetector",
    "build",
    "flagged",
    "measure_error",
    "scores_of",
]
