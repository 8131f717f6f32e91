"""Which model an adapter was made for: what its record says, and whether that is the model at hand."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.files import read_json
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.schedule import DiscreteSchedule
from valign.models.files.adapter_files import AdapterFile
from valign.models.files.fingerprint import fingerprint_folder

KOHYA_VELOCITY = "ss_v_parameterization"  # in the header of kohya's files: "True" where the model predicts velocity
log = logging.getLogger(__name__)


def base_record(model: DiffusionModel) -> dict[str, Any]:
    """What an adapter's record says of the model that it was made on."""
    known = {"base": model.folder, "base_fingerprint": model.fingerprint(), "family": model.family}
    return known | {"prediction": model.schedule.kind}


def check_base(model: DiffusionModel | Path, file: AdapterFile, *, anyway: bool = False) -> None:
    """Refuse an adapter of another model, of another family or of a model that predicts something else.

    Where the record is silent a warning names what is unknown: weights of the right shapes fit many models.

    Args:
        model: Loaded, or a pipeline's folder.
        anyway: Only warn.
    Raises: UserError that names what the record says and what the model is.
    """
    record, silent = file.metadata, []
    made: list[tuple[str, str, str]] = []
    own = _folder_record(model) if isinstance(model, Path) else base_record(model)
    for what, said, here in (
        ("base model", record.get("base_fingerprint"), own["base_fingerprint"]),
        ("family", record.get("family"), own["family"]),
        ("prediction type", recorded_prediction(file), own["prediction"]),
    ):
        if said is None:
            silent.append(what)
        elif said != here:
            name = f"{record.get('base', 'of fingerprint')} {said[:12]}" if what == "base model" else str(said)
            made.append((what, name, here[:12] if what == "base model" else here))
    if made:
        differs = "; ".join(f"{what} {name}, not {here}" for what, name, here in made)
        text = f"{file.folder} was made for another model than {own['base']}: {differs}."
        if not anyway:
            raise UserError(f"{text} Load the model that it was made for, or use it anyway (--anyway) and measure what it does.")
        _warn(f"{text} It is used anyway.")
    elif "base model" in silent:
        _warn(
            f"{file.folder} has no record of its {', '.join(silent)}: whether it was made for {own['base']} is unknown. "
            "Compare images with and without it."
        )


def _folder_record(folder: Path) -> dict[str, Any]:
    """As `base_record`, from a pipeline's files alone."""
    from valign.models.diffusion.loading import read_family

    schedule = DiscreteSchedule(read_json(folder / "scheduler" / "scheduler_config.json"), str(folder))
    known = {"base": str(folder), "base_fingerprint": fingerprint_folder(folder), "family": read_family(folder).family}
    return known | {"prediction": schedule.kind}


def recorded_prediction(file: AdapterFile) -> str | None:
    """``epsilon`` or ``velocity`` as the adapter's record or kohya's header says; None where neither does."""
    said = file.metadata.get("prediction")
    if said is None and KOHYA_VELOCITY in file.tensors.metadata:
        return "velocity" if file.tensors.metadata[KOHYA_VELOCITY] == "True" else "epsilon"
    return None if said is None else str(said)


@cache
def _warn(text: str) -> None:
    """Once per text: a comparison loads an adapter again and again."""
    log.warning("%s", text)
