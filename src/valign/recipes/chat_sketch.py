"""A language model by its config.json alone: what training it on chats would need, without its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from valign.adapters import default_targets
from valign.checks import UserError, first_line
from valign.models.devices import DTYPES, LOAD_ERRORS
from valign.models.footprint import Unit, materialize, simulation, weights_read

FOUR_BITS = 0.516  # bytes a number: half a byte, and a quantized range for each 64


def chat_training(
    folder: Path,
    *,
    precision: str,
    tokens: int,
    rank: int | None,
    targets: Sequence[str] = (),
    checkpointed: bool,
    four_bit: bool = False,
) -> tuple[Unit, int]:
    """A pass with gradients of one chat of ``tokens`` tokens, whose trained numbers count among the weights; and how many they are.

    Args:
        folder: With a config.json.
        rank: Of a LoRA on the ``targets`` (the architecture's own if none are named); None trains every weight.
        four_bit: The linear layers' frozen weights are in 4 bits a number, and one of them at a time in ``precision``.
    Raises: UserError for a folder without a configuration of a causal language model.
    """
    network = _empty(folder, precision)
    saved = _saved(network) if four_bit else 0
    if checkpointed:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False})
    network = network.train()
    if rank is None:
        network.requires_grad_(True)
    else:
        network = _with_lora(network, rank, default_targets(network, targets))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    with simulation() as meter:
        materialize(network)
        weights, ids = meter.now, torch.zeros(1, tokens, dtype=torch.long)

        def work() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"):
                logits = network(input_ids=ids, use_cache=False).logits
            cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()

        found = meter.measure(work)
    reads = weights_read([network], 3 if checkpointed else 2)
    return Unit(weights - saved, found.peak - weights - 4 * trained, found.flops, reads), trained


def _saved(network: Any) -> int:
    """Bytes that 4 bits a number save in all linear layers but the head, less the largest of them as it is read."""
    head = network.get_output_embeddings()
    linear = [module.weight for module in network.modules() if isinstance(module, nn.Linear) and module is not head]
    whole, numbers = (sum(f(weight) for weight in linear) for f in (lambda w: w.numel() * w.element_size(), lambda w: w.numel()))
    return int(whole - FOUR_BITS * numbers - max(weight.numel() * weight.element_size() for weight in linear))


def _empty(folder: Path, precision: str) -> Any:
    """The network on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} must have a config.json to be estimated by, got none. Give the model's folder; its weights may be missing."
        )
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    except LOAD_ERRORS as error:
        raise UserError(f"{folder}/config.json must be of a causal language model, got: {first_line(error)}.") from error


def _with_lora(network: nn.Module, rank: int, targets: Sequence[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        adapted: Any = get_peft_model(network, LoraConfig(r=rank, target_modules=list(targets)))  # type: ignore[arg-type]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
