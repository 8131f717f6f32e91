"""Which model an adapter was made for: what its record says, against the model at hand. Of diffusion models and of chat models."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.files import hash_file, hash_value, read_json
from valign.models.files.fingerprint import ENDINGS

ROWS = {"base model": "base_fingerprint", "family": "family", "prediction type": "prediction"}  # what is compared -> its key
log = logging.getLogger(__name__)


def check_record(
    adapter: Path, record: Mapping[str, Any], own: Mapping[str, Any], *, anyway: bool = False, flag: str = "--anyway"
) -> None:
    """Refuse an adapter whose record names another model, another family or another prediction type.

    Where the record is silent a warning names what is unknown: weights of the right shapes fit many models.

    Args:
        record: The adapter's.
        own: What a record would say of the model at hand: ``base``, and the keys of `ROWS` that its kind has.
        anyway: Only warn.
        flag: Of the command line, that sets ``anyway``.
    Raises: UserError that names what the record says and what the model is.
    """
    made, silent = [], []
    for what, key in ROWS.items():
        said, here = record.get(key), own.get(key)
        if here is None:
            continue
        if said is None:
            silent.append(what)
        elif said != here:
            short = what == "base model"
            name = f"{record.get('base', 'of fingerprint')} {str(said)[:12]}" if short else str(said)
            made.append(f"{what} {name}, not {here[:12] if short else here}")
    if made:
        text = f"{adapter} was made for another model than {own['base']}: {'; '.join(made)}."
        if not anyway:
            raise UserError(f"{text} Load the model that it was made for, or use it anyway ({flag}) and measure what it does.")
        _warn(f"{text} It is used anyway.")
    elif "base model" in silent:
        _warn(
            f"{adapter} has no record of its {', '.join(silent)}: whether it was made for {own['base']} is unknown. "
            "Compare what the model gives with and without it."
        )


def chat_record(folder: Path) -> dict[str, Any]:
    """What the record of an adapter of a chat model says of the model, from its folder's files alone."""
    family = read_json(folder / "config.json").get("model_type")
    return {"base": str(folder), "base_fingerprint": chat_folder_fingerprint(folder), "family": family}


def chat_folder_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the files of a chat model's or an adapter's folder that shape its answers, hex.

    Raises: UserError if the folder is missing or holds no weights.
    """
    path = Path(folder).expanduser()
    files = sorted(file for file in path.glob("*") if file.suffix in (*ENDINGS, ".jinja") and file.is_file())
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{path} must be a folder with safetensors, got none. Check the path.")
    return hash_value({file.name: hash_file(file) for file in files})


@cache
def _warn(text: str) -> None:
    """Once per text: a comparison loads an adapter again and again."""
    log.warning("%s", text)
