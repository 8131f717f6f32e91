"""Random factors, and what a merge makes of them."""

import torch

from valign.merging.experts import Expert
from valign.models.files.adapter_files import LoraFactors, open_adapter, save_adapter

SHAPES = {"down_blocks.0.to_q": (7, 5), "mid_block.to_v": (6, 9), "up_blocks.1.to_out.0": (8, 8)}


def random_factors(shapes=SHAPES, *, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g), 0.5)
        for name, (o, i) in shapes.items()
    }


def random_experts(folder, model, names, endings):
    """Saved experts of random factors on the model's layers with these endings."""
    shapes = {name: layer.weight.shape for name, layer in model.denoiser.named_modules() if name.endswith(endings)}
    for seed, name in enumerate(names):
        factors, metadata = random_factors(shapes, seed=seed), {"base_fingerprint": model.fingerprint()}
        save_adapter(folder / name, factors, metadata=metadata)
    return [Expert(name, open_adapter(folder / name)) for name in names]


def deltas(stream):
    """Dense results by module, of a merge or of an expert."""
    return {module: lora.delta() for module, lora in stream}
