"""Random factors, and what a merge makes of them."""

import torch

from valign.models.files.adapter_files import LoraFactors

SHAPES = {"down_blocks.0.to_q": (7, 5), "mid_block.to_v": (6, 9), "up_blocks.1.to_out.0": (8, 8)}


def random_factors(shapes=SHAPES, *, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g), 0.5)
        for name, (o, i) in shapes.items()
    }


def deltas(stream):
    """Dense results by module, of a merge or of an expert."""
    return {module: lora.delta() for module, lora in stream}
