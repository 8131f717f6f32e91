"""A chat model's training by its config.json alone: what a base in 4 bits saves, counted by hand."""

import pytest

from valign.recipes.chat_sketch import FOUR_BITS, chat_training
from valign.worlds.chat import model_folder


def test_four_bits_save_what_their_weights_do():
    """Of every projection in the folder; neither head nor embeddings, and the largest one counts in full, too."""
    from safetensors import safe_open

    folder = model_folder("aligned")
    options = {"precision": "float32", "tokens": 16, "rank": 4, "checkpointed": False}
    whole, trained = chat_training(folder, **options)
    packed, same = chat_training(folder, **options, four_bit=True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    linear = [shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and "proj" in name]
    assert whole.weights - packed.weights == pytest.approx((4 - FOUR_BITS) * sum(linear) - 4 * max(linear), abs=1)
    assert trained == same
    assert whole.activations == packed.activations
