"""Safety preferences for a realignment that learns: which rows its models take, and the model at the fine-tunings' start."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from valign.checks import UserError
from valign.data.chats import ChatPair, read_chat_pairs
from valign.data.images.quadruples import Quadruples, read_quadruples
from valign.data.prompts.tables import AS_IT_IS, TableReading
from valign.files import hash_value
from valign.merging.realign.chat_preferences import ChatPreferences
from valign.merging.realign.image_preferences import ImagePreferences
from valign.merging.realign.opening import Realignment
from valign.merging.realign.somf import SafetyPreferences
from valign.models.files.adapter_files import AdapterFile
from valign.models.files.weight_files import WeightFolder
from valign.models.language.loading import load_chat

PAIR_COLUMNS = ("chosen", "rejected", "safe_image", "unsafe_image")  # of their tables, beside those that prompts have
PreferenceRows = Sequence[ChatPair] | Quadruples  # of a chat model; of a diffusion model


def read_preferences(
    opened: Realignment, place: Path, *, known: Collection[str], reading: TableReading = AS_IT_IS
) -> PreferenceRows:
    """A chat model's table of ``prompt``, ``chosen`` and ``rejected``, or the quadruples of a diffusion model's folder.

    Args:
        known: Ids of the policy's categories, for quadruples.
        reading: Other names of the table's columns.
    Raises: UserError for what cannot be read, and without the base model's folder.
    """
    if _is_diffusion(_root(opened)):
        return read_quadruples(place, known=known, reading=reading)
    return read_chat_pairs(place, reading)


def load_preferences(
    opened: Realignment, rows: PreferenceRows, *, max_tokens: int = 512, device: str = "auto", seed: int = 0
) -> SafetyPreferences:
    """The rows with the model where the fine-tunings started, in float32.

    Raises: UserError for rows of the other kind, a U-Net without its pipeline, or no folder of the base model.
    """
    from valign.models.diffusion.loading import load_model  # diffusers is not needed for chat models

    root = _root(opened)
    safety = opened.aligned if opened.offset is not None and isinstance(opened.aligned, AdapterFile) else None
    if not _is_diffusion(root):
        if isinstance(rows, Quadruples):
            raise UserError(f"A chat model must learn from pairs of answers, got images of {rows.origin}. Give a table of pairs.")
        adapter = None if safety is None else safety.folder
        chat = load_chat(root.model, adapter=adapter, device=device, dtype="float32", anyway=True)  # checked when it was opened
        return ChatPreferences(chat, rows, max_tokens=max_tokens)
    if not isinstance(rows, Quadruples):
        raise UserError(f"A diffusion model must learn from quadruples with images, got {len(rows)} pairs of answers.")
    if not (root.model / "model_index.json").exists():
        raise UserError(f"{root.model} must be a whole pipeline to learn on, got its denoiser alone. Name the pipeline's folder.")
    model = load_model(root.model, device=device, dtype="float32")
    if opened.offset is not None:
        weights = dict(model.denoiser.named_parameters())
        with torch.no_grad():
            for name in opened.offset.names:
                weight = weights[name]
                weight.add_(opened.offset.delta(name).delta().reshape(weight.shape).to(weight))
    return ImagePreferences(model, rows, seed=seed)


def rows_fingerprint(rows: PreferenceRows) -> str:
    """SHA-256 of the rows, hex, without the model."""
    if isinstance(rows, Quadruples):
        return rows.fingerprint
    return hash_value([[pair.safe.messages, pair.unsafe.messages] for pair in rows])


def _root(opened: Realignment) -> WeightFolder:
    if opened.root is None:
        raise UserError(f"somf must have the base model's folder to learn on, got {opened.base}. Download it, and name its folder.")
    return opened.root


def _is_diffusion(root: WeightFolder) -> bool:
    return "_class_name" in root.config  # diffusers' components name their class, transformers' models their type
