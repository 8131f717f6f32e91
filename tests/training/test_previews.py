import numpy as np
import torch
from PIL import Image

from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.training.engine.previews import GAP, Previews


def test_rows_are_base_and_current_at_equal_seeds(sd, tmp_path):
    attach_lora(sd, rank=2)
    try:
        previews = Previews(sd, tmp_path / "samples", ("one", "two"), steps=2)
        first = np.array(Image.open(previews.write(0)))
        assert first.shape == (2 * 64 + GAP, 2 * 64 + GAP, 3)
        assert (first[:64] == first[64 + GAP :]).all()  # B = 0
        with torch.no_grad():
            for name, parameter in sd.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        second = np.array(Image.open(previews.write(3)))
        assert (second[:64] == first[:64]).all()
        assert (second[64 + GAP :] != first[64 + GAP :]).any()
    finally:
        unload_adapters(sd)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000000.png", "step-000003.png"]
