"""What every way to fine-tune has in common: options that attach it to a network, and the handle thing that trains."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from torch import Tensor, nn

from valign.adapters import export_lora, save_peft_lora
from valign.checks import UserError
from valign.files import atomic_folder
from valign.randomness import generator_for

USUAL = (("query", "value"), ("q_proj", "v_proj"), ("to_q", "to_v"))  # where peft's names are those of an older transformers


@dataclass(frozen=True, kw_only=True)
class AttachContext:
    """What a method may know when it is handle.

    ``loss(number, half)`` is the mean loss, with gradients, of batch ``number`` of the training rows, the same at every call.
    ``half`` 0 and 1 are disjoint halves of the rows, None is all of them.
    """

    network: nn.Module
    head: tuple[nn.Parameter, ...]  # trains beside the network; none for a language model
    targets: tuple[str, ...]  # endings of the names of linear modules
    steps: int  # of the whole training
    batch_size: int  # rows of a step
    first_rate: float  # share of the learning rate at the first step, (0, 1]
    seed: int
    loss: Callable[[int, int | None], Tensor]

    def generator(self, word: str) -> torch.Generator:
        """A generator of its own for each use."""
        return generator_for(word, self.seed)


class AdapterHandle:
    """A method on its network while it trains; plain adapters need no more than this.

    Order in a step: forward, ``loss + penalty``, backward, clipping, the optimizer's step, `after_step`.
    """

    def __init__(self, network: nn.Module, *, spent: int = 0) -> None:
        self.network = network
        self.spent = spent  # steps of the budget that the start has used

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; ``rate`` is a factor on the learning rate."""
        return [{"params": [p for p in self.network.parameters() if p.requires_grad], "rate": 1.0}]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow the optimizer; nothing by default."""

    def penalty(self) -> Float[Tensor, ""] | None:
        """Added to the mean loss of a step."""
        return None

    def after_step(self, step: int) -> None:
        """Step ``step`` (from 0) is over; gradients are still there."""

    @property
    def settled(self) -> bool:
        """Whether its modules and ranks are final: only then may a step be kept as the best."""
        return True

    def extra(self) -> dict[str, Any]:
        """What is not in the network's tensors: nested, JSON-able but for tensors."""
        return {}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Undo `extra`, before the tensors are written back."""

    def numbers(self) -> int:
        """How many numbers the finished method has learnt."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

    def merged(self) -> nn.Module:
        """The bare network with what was learnt in its own weights, all frozen: the start of a next task. The adapter is gone."""
        network = self.network.merge_and_unload() if isinstance(self.network, PeftModel) else self.network  # type: ignore[operator]
        return network.requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write it as the folder that peft (or transformers, for a whole network) loads."""
        with atomic_folder(folder) as temporary:
            self.network.save_pretrained(str(temporary))  # type: ignore[operator]
            (temporary / "README.md").unlink(missing_ok=True)  # peft's empty form


class LoraHandle(AdapterHandle):
    """Any LoRA of `valign.adapters`: saved as plain LoRA for the base weights as they were."""

    network: PeftModel

    def save(self, folder: Path) -> None:
        base = self.network.peft_config[self.network.active_adapter].base_model_name_or_path or ""  # type: ignore[index]
        save_peft_lora(folder, export_lora(self.network), base=base)


@runtime_checkable
class AdapterOptions(Protocol):
    """The options of a method, a frozen dataclass whose defaults are its own; `attach` puts it on a network."""

    @property
    def learning_rate(self) -> float: ...
    def attach(self, context: AttachContext) -> AdapterHandle: ...


def adapter_bytes(folder: Path) -> int:
    """Size of the weight files that `AdapterHandle.save` wrote, in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")


@contextmanager
def seeded(context: AttachContext, word: str = "adapter") -> Iterator[None]:
    """peft draws its start values from torch's global generator: seed it for this block only."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.generator(word).initial_seed())
        yield


def linear_endings(network: nn.Module) -> list[str]:
    """Last names of the linear modules, sorted, each once."""
    return sorted({name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, nn.Linear)})


def layer_linears(network: nn.Module) -> tuple[str, ...]:
    """Endings of all linear modules inside numbered layers: attention and MLP, neither heads nor projections of the input.

    A module that is itself a number goes with the name before it, as ``to_out.0``.
    """
    paths = [name.split(".") for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    inner = [path for path in paths if any(part.isdigit() for part in path)]
    return tuple(sorted({".".join(path[-2:] if path[-1].isdigit() else path[-1:]) for path in inner}))


def default_targets(network: nn.Module, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """``wanted``, checked; without any, peft's default for the architecture, or else queries and values by their usual names.

    Raises: UserError if one matches nothing (available endings are listed), or there is no default.
    """
    names = [f".{name}" for name, _ in network.named_modules()]
    have = ", ".join(linear_endings(network))

    def there(target: str) -> bool:
        return any(name.endswith(f".{target}") for name in names)

    for target in wanted:
        if not there(target):
            raise UserError(f"--targets must name modules of the model, got {target!r}. Its linear modules: {have}.")
    if wanted:
        return tuple(wanted)
    kind = getattr(getattr(network, "config", None), "model_type", "")
    for targets in (tuple(KNOWN.get(kind, ())), *USUAL):
        if targets and all(map(there, targets)):
            return targets
    raise UserError(f"--targets must be given for a model of type {kind!r}, got none. Its linear modules: {have}.")
