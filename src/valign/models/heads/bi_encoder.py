"""A bi-encoder on a frozen sentence encoder: one matrix for questions, one for contexts; their dot product is the score."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file

from valign.checks import UserError
from valign.files import atomic_path
from valign.models.encoders.minilm import SentenceEncoder

SCALE = 20.0  # of the dot product of an untrained one, so that a softmax over cosines is not flat


@runtime_checkable
class HashedEncoder(SentenceEncoder, Protocol):
    """A sentence encoder that says which weights it has, such as `MiniLM`."""

    dim: int
    sha256: str


@dataclass(frozen=True, eq=False)
class BiEncoder:
    """``encode(question) @ question_matrix`` against ``encode(context) @ context_matrix``."""

    question_matrix: Float[np.ndarray, "dim out"]
    context_matrix: Float[np.ndarray, "dim out"]
    encoder_sha256: str  # of the sentence encoder's weights that it was fitted on

    def questions(self, encoder: HashedEncoder, texts: Sequence[str]) -> Float[np.ndarray, "text out"]:
        """Vectors of requests, float32."""
        return np.asarray(self._checked(encoder).encode(texts) @ self.question_matrix, dtype=np.float32)

    def contexts(self, encoder: HashedEncoder, texts: Sequence[str]) -> Float[np.ndarray, "text out"]:
        """Vectors of the texts that are searched, float32."""
        return np.asarray(self._checked(encoder).encode(texts) @ self.context_matrix, dtype=np.float32)

    def save(self, path: Path) -> None:
        """As safetensors, in 16 bits."""
        tensors = {"question": self.question_matrix.astype(np.float16), "context": self.context_matrix.astype(np.float16)}
        with atomic_path(path) as file:
            save_file(tensors, file, metadata={"encoder_sha256": self.encoder_sha256})

    def _checked(self, encoder: HashedEncoder) -> HashedEncoder:
        if encoder.sha256 != self.encoder_sha256:
            raise UserError("BiEncoder was fitted on another encoder. Fit it again, or install the encoder that it names.")
        return encoder


def untrained(encoder: HashedEncoder) -> BiEncoder:
    """The frozen encoder alone: `SCALE` times the cosine."""
    same = np.eye(encoder.dim, dtype=np.float32) * SCALE**0.5
    return BiEncoder(same, same.copy(), encoder.sha256)


def load_bi_encoder(path: Path) -> BiEncoder:
    """Raises: UserError if the file is not one, or holds what is not finite."""
    try:
        with safe_open(path, "numpy") as file:
            question, context = (file.get_tensor(name).astype(np.float32) for name in ("question", "context"))
            sha256 = file.metadata()["encoder_sha256"]
    except Exception as error:
        raise UserError(
            f"{path} is not a retriever of guidelines ({type(error).__name__}). Make one with `valign guidelines fit`."
        ) from None
    if question.shape != context.shape or question.ndim != 2 or not (np.isfinite(question).all() and np.isfinite(context).all()):
        raise UserError(
            f"{path} must hold two finite matrices of one shape, got {question.shape} and {context.shape}. Fit it again."
        )
    return BiEncoder(question, context, sha256)
