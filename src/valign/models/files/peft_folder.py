"""A peft adapter's folder without what only this machine knows."""

from pathlib import Path

from peft import PeftModel

from valign.files import read_json, write_json


def save_lora(network: PeftModel, folder: Path) -> None:
    """peft's files, without a form to fill in and without the place of the base model."""
    network.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": ""})
