"""Which model an adapter was made for: what its record says, and whether that is the model at hand."""

from pathlib import Path
from typing import Any

from valign.files import read_json
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.schedule import DiscreteSchedule
from valign.models.files.adapter_base import check_record
from valign.models.files.adapter_files import AdapterFile
from valign.models.files.fingerprint import fingerprint_folder

KOHYA_VELOCITY = "ss_v_parameterization"  # in the header of kohya's files: "True" where the model predicts velocity


def base_record(model: DiffusionModel) -> dict[str, Any]:
    """What an adapter's record says of the model that it was made on."""
    known = {"base": model.folder, "base_fingerprint": model.fingerprint(), "family": model.family}
    return known | {"prediction": model.schedule.kind}


def check_base(model: DiffusionModel | Path, file: AdapterFile, *, anyway: bool = False) -> None:
    """Refuse an adapter of another model, of another family or of a model that predicts something else.

    Args: model: Loaded, or a pipeline's folder.
    Raises: UserError as `check_record`, which warns where the record is silent.
    """
    own = _folder_record(model) if isinstance(model, Path) else base_record(model)
    check_record(file.folder, {**file.metadata, "prediction": recorded_prediction(file)}, own, anyway=anyway)


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
