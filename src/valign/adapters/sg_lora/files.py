"""A trained SG-LoRA generator as a folder: tensors as safetensors, the rest as JSON."""

from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from valign.adapters.sg_lora.generation import Scales, SgLora, SgLoraConfig
from valign.adapters.sg_lora.library import ExpertLibrary, LoraSchema
from valign.checks import UserError
from valign.files import atomic_folder, read_json, write_json

TENSORS, RECORD = "generator.safetensors", "generator.json"
STATISTICS = ("embeddings", "means", "variances")


def save_sg_lora(folder: Path, generator: SgLora) -> None:
    """Write a new folder with all that `SgLora.generate` needs; the experts' checkpoints are left out."""
    library = generator.library
    tensors = {f"library.{name}": getattr(library, name) for name in STATISTICS}
    tensors |= {f"scales.{field.name}": getattr(generator.scales, field.name) for field in fields(Scales)}
    tensors |= {f"network.{name}": tensor for name, tensor in generator.network.state_dict().items()}
    with atomic_folder(Path(folder)) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        record = {
            "names": list(library.names),
            "start": library.start,
            "lora": dict(library.config),
            "shapes": {name: list(shape) for name, shape in library.schema.shapes.items()},
            "dtype": str(library.schema.dtype).removeprefix("torch."),
            "config": asdict(generator.config),
            "losses": list(generator.losses),
        }
        write_json(temporary / RECORD, record)


def load_sg_lora(folder: Path) -> SgLora:
    """Read a folder of `save_sg_lora`; it generates the same bytes. The library's ``samples`` are empty.

    Raises: UserError if a file is missing or the two do not fit together.
    """
    record, path = read_json(Path(folder) / RECORD), Path(folder) / TENSORS
    if not path.is_file():
        raise UserError(f"{folder} must hold {TENSORS}, got none. Save the generator again.")
    tensors = load_file(path)

    def part(room: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(f"{room}."): tensor for name, tensor in tensors.items() if name.startswith(f"{room}.")}

    config = SgLoraConfig(**record["config"])
    shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
    schema = LoraSchema(shapes, getattr(torch, record["dtype"]))
    network = config.network(schema)
    try:
        network.load_state_dict(part("network"))
        statistics, start = part("library"), record.get("start", "")
        library = ExpertLibrary(schema, tuple(record["names"]), record["lora"], **statistics, samples=(), start=start)
        scales = Scales(**part("scales"))
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{folder}: {TENSORS} must fit {RECORD}, got {str(error).splitlines()[0]} Save the generator again."
        ) from None
    return SgLora(library, network.requires_grad_(False).eval(), scales, config, tuple(record["losses"]))
