"""Models of the Hugging Face hub by their ids: in the hub's cache, or fetched. torch is not needed."""

import re
from pathlib import Path

from valign.checks import UserError, close_to, first_line

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def local_folder(name: str) -> Path | None:
    """The folder of a diffusers model by its path, or by its hub id where the hub's cache has it; None otherwise. No download."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (path := Path(name).expanduser()).is_dir():
        return path
    try:
        cached = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:  # the name of nothing; loading will say so
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def fetched(name: str, file: str) -> Path:
    """A small file of a model of the hub, from its cache where it is there.

    Args: name: ``owner/name``, which is not a folder here.
    Raises: UserError as `not_fetched` says it.
    """
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            return Path(cached)
        model_info(name, timeout=5)  # a download tries again and again where there is no network
        return Path(hf_hub_download(name, file))
    except Exception as error:
        raise not_fetched(name, error) from error


def not_fetched(name: str, error: Exception) -> UserError:
    """What to say of a model that is neither here nor on the hub, with what is spelt most like it beside it."""
    reason = re.split(r" \(|\. ", first_line(error))[0]
    beside = Path(name).expanduser().parent
    near = close_to(name, [str(path) for path in sorted(beside.iterdir()) if path.is_dir()] if beside.is_dir() else [])
    return UserError(
        f"{name} is not a folder here and could not be fetched from the hub: {reason}.{near} "
        "Check the spelling, the network, and that the model is published as safetensors."
    )
