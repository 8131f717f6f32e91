"""Where a model comes from, told from its folder's files: what a detector's domain is compared with. No network is loaded."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from valign.checks import UserError
from valign.files import read_json

WORLD_FILE = "valign_world.json"  # in a world's model folder: {"world": name, "version": number}


def model_origins(folder: Path | str) -> tuple[str, ...]:
    """The origins of a diffusers folder; none where the folder has neither a world's record nor an autoencoder.

    ``world:NAME`` where the folder says so in `WORLD_FILE`, and ``autoencoder:HASH``, which a model shares with everything that
    was fine-tuned from it and with its copies in another precision, since none of these change the autoencoder.
    """
    folder, found = Path(folder), []
    if (folder / WORLD_FILE).is_file():
        record = read_json(folder / WORLD_FILE)
        if not isinstance(record, dict) or not isinstance(record.get("world"), str) or not record["world"]:
            raise UserError(f'{folder / WORLD_FILE} must name its world, as {{"world": "shapes", "version": 1}}; got {record!r}.')
        found.append(f"world:{record['world']}")
    files = sorted((folder / "vae").glob("*.safetensors"))
    if files:
        found.append(f"autoencoder:{hash_in_half(files[0])}")
    return tuple(found)


def hash_in_half(path: Path) -> str:
    """SHA-256 over names, shapes and values of a safetensors file, the values rounded to float16; hex."""
    digest = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be read: {error}. Download or save the model again.") from error
    return digest.hexdigest()
