"""CLIP as a classifier: an image's class is the one whose name, put into a sentence, lies nearest."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from valign.data.tasks.images import LabelledImage
from valign.models.encoders.clip import ClipEncoder
from valign.models.heads.image_model import pixel_values
from valign.models.heads.task_model import Target, TaskBatch, TaskModel

TEMPLATE = "a photo of a {}."  # CLIP's own, for classes without a better one


class ClipTaskModel(TaskModel):
    """Logits are ``exp(logit_scale) * cosine`` between image and class text, the scale frozen; both encoders may be adapted.

    There is no head, so it answers before any training, and for other classes when ``target`` is replaced.

    Args:
        encoder: Its model becomes ``network``, and is changed by training.
        template: Sentence with ``{}`` where a class's name goes.
    """

    def __init__(self, encoder: ClipEncoder, target: Target, *, template: str = TEMPLATE) -> None:
        super().__init__(encoder.model, target, apart=False, fingerprint=encoder.weights_sha256, seed=None)
        self.encoder, self.template = encoder, template

    def batch(self, rows: Sequence[LabelledImage]) -> TaskBatch:
        return TaskBatch(self.images(rows), self.target.tensor(rows).to(self.device), len(rows))

    def images(self, rows: Sequence[LabelledImage]) -> dict[str, Tensor]:
        """As the network takes them; their classes need not be the target's."""
        return {"pixel_values": self.encoder.prepare(pixel_values(rows))}

    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "input width"]:
        """Unit vectors of images, or of tokenized texts."""
        encode = self.network.get_image_features if "pixel_values" in inputs else self.network.get_text_features
        return normalize(encode(**inputs).pooler_output, dim=1)  # type: ignore[operator]

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """Unit vectors of texts, with gradients."""
        length = self.encoder.model.config.text_config.max_position_embeddings
        tokens = self.encoder.tokenizer(list(texts), padding=True, max_length=length, truncation=True, return_tensors="pt")
        return self.vectors({"input_ids": tokens.input_ids.to(self.device)})

    def forward(self, batch: TaskBatch) -> Float[Tensor, "row class"]:
        classes = self.texts([self.template.format(label) for label in self.target.labels])
        scale: Tensor = self.network.logit_scale  # type: ignore[assignment]
        return scale.detach().exp() * self.vectors(batch.inputs) @ classes.T

    def reading(self) -> dict[str, Any]:
        return {"template": self.template, "side": self.encoder.image_size}
