"""Models and adapters in miniature: folders that transformers and diffusers would load, with chosen weights."""

import torch
from safetensors.torch import save_file

from valign.files import write_json
from valign.merging.deltas import DenseDelta, NamedDeltas

SHAPES = {"a.weight": (6, 4), "b.weight": (5, 7), "norm.weight": (6,), "conv.weight": (3, 2, 2, 2), "embed_tokens.weight": (9, 4)}


def tensors(seed, shapes=SHAPES, *, scale=1.0):
    """Random weights."""
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def plus(start, *changes):
    """Entry-wise sums."""
    return {name: sum((change[name] for change in changes), start[name].clone()) for name in start}


def model(folder, weights, *, shards=1, **config):
    """A transformers-like folder."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"model_type": "toy", **config})
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names, table = sorted(weights), {}
    for number in range(shards):
        part = {name: weights[name] for name in names[number::shards]}
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
    return folder


def named(change):
    """Changes in memory, as matrices."""
    return NamedDeltas({name: DenseDelta(tensor.reshape(len(tensor), -1)) for name, tensor in change.items()})


def peft_adapter(folder, factors, *, alpha=None, rank_pattern=None, tensors=None, **config):
    """A peft folder of ``{module: (down, up)}``."""
    folder.mkdir(parents=True)
    found = {}
    for module, (down, up) in factors.items():
        found[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        found[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
    rank = next(iter(factors.values()))[0].shape[0]
    save_file({**found, **(tensors or {})}, folder / "adapter_model.safetensors")
    record = {"peft_type": "LORA", "r": rank, "lora_alpha": rank if alpha is None else alpha, "rank_pattern": rank_pattern or {}}
    write_json(folder / "adapter_config.json", {**record, **config})
    return folder


def factors(seed, shapes, *, rank=2, scale=1.0):
    """Random LoRA factors by module."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, shape[1], generator=g), scale * torch.randn(shape[0], rank, generator=g))
        for name, shape in shapes.items()
    }
