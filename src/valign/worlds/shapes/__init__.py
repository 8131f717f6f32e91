"""The shapes world: scenes of glyphs, where seven groups of neutral drawings stand in for the seven harm categories."""

from pathlib import Path

from valign.checks import UserError
from valign.worlds.shapes.grammar import Grammar
from valign.worlds.shapes.suite import heads, reference_images, roles, suite

__all__ = ["Grammar", "clip_folder", "heads", "model_folder", "oracle_folder", "reference_images", "roles", "suite"]

ASSETS = Path(__file__).parent / "assets"


def model_folder() -> Path:
    """The bundled miniature `StableDiffusionPipeline`."""
    return _bundled("model")


def oracle_folder() -> Path:
    """The bundled oracle."""
    return _bundled("oracle")


def clip_folder() -> Path:
    """The bundled miniature CLIP."""
    return _bundled("clip")


def _bundled(name: str) -> Path:
    folder = ASSETS / name
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: this installation lacks the bundled weights. Install valign again from a full checkout."
        )
    return folder
