"""One hash for a model folder: its configurations, tokenizer files and safetensors, by name and content. torch is not needed."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from valign.files import hash_file, hash_value

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = ("scheduler", *TEXT_PARTS, "unet", "vae")
ENDINGS = (".json", ".txt", ".safetensors")


def model_files(folder: Path, parts: Sequence[str] = PARTS) -> list[Path]:
    """The files that shape a model's output, sorted; the safety checker is none of them. Some ``parts`` go without the index."""
    files = [file for part in parts for file in sorted((folder / part).glob("*")) if file.suffix in ENDINGS]
    return files if parts != PARTS else [folder / "model_index.json", *files]


def fingerprint_folder(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """SHA-256 over the hashes of `model_files`, hex. Files are streamed."""
    return hash_value({file.relative_to(folder).as_posix(): _hashed(file, *_state(file)) for file in model_files(folder, parts)})


@lru_cache(maxsize=512)
def _hashed(file: Path, size: int, changed: int) -> str:
    """Of gigabytes, which several checks of one command ask for: read again only when size or time of change differ."""
    return hash_file(file)


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
