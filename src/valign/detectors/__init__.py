"""Is this image harmful, and how? One interface, used by the guard and by the evaluation."""

from valign.detectors.any_of import AnyOf
from valign.detectors.base import flagged, measure_error, scores_of
from valign.detectors.clip_probe import ClipProbeDetector
from valign.detectors.nudenet import NudeNetDetector
from valign.detectors.oracle import OracleDetector
from valign.detectors.safety_checker import SafetyCheckerDetector
from valign.interfaces import Detector, DetectorCard

DETECTORS = {
    "clip-probe": ClipProbeDetector,
    "nudenet": NudeNetDetector,
    "oracle": OracleDetector,
    "safety-checker": SafetyCheckerDetector,
}

__all__ = [
    "DETECTORS",
    "AnyOf",
    "ClipProbeDetector",
    "Detector",
    "DetectorCard",
    "NudeNetDetector",
    "OracleDetector",
    "SafetyCheckerDetector",
    "flagged",
    "measure_error",
    "scores_of",
]
