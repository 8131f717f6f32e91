"""What every adapter method is made of: options that attach it to a network, and a handle on it while it trains."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from torch import Tensor, nn

from valign.adapters.factors import export_lora, save_peft_lora
from valign.checks import UserError, check_range
from valign.files import atomic_folder
from valign.models.diffusion.lora import add_lora
from valign.randomness import generator_for

# The mean loss of a batch, with gradients, and how many tokens (or rows) it is a mean of, computed when it is called.
CountedLoss = Callable[[], tuple[Tensor, int]]
USUAL = (("query", "value"), ("q_proj", "v_proj"), ("to_q", "to_v"))  # where peft's names are those of an older transformers


@dataclass(frozen=True, kw_only=True)
class AttachContext:
    """What a method may know when it is attached.

    ``loss(number, half)`` is the mean loss, with gradients, of batch ``number`` of the training rows, the same at every call.
    ``half`` 0 and 1 are disjoint halves of the rows, None is all of them.
    """

    network: nn.Module
    head: tuple[nn.Parameter, ...]  # trains beside the network; none for a language model or a denoiser
    targets: tuple[str, ...]  # endings of the names of linear modules
    steps: int  # of the whole training
    batch_size: int  # rows of a step
    first_rate: float  # share of the learning rate at the first step, (0, 1]
    seed: int
    loss: Callable[[int, int | None], Tensor]
    expert: bool = False  # the network with the adapter off is the reference: base weights stay, experts of one seed share A
    processes: int = 1
    reduce: Callable[[Tensor], Tensor] | None = None  # the sum of a tensor over processes
    forget: Sequence[tuple[CountedLoss, CountedLoss]] = ()  # every batch of rows to forget, each with one of rows to retain

    def generator(self, word: str) -> torch.Generator:
        """A generator of its own for each use."""
        return generator_for(word, self.seed)

    def first_learning_rate(self, learning_rate: float) -> float:
        """Learning rate of the first step of a training at ``learning_rate``."""
        return learning_rate * self.first_rate

    def first_losses(self, rows: int) -> Sequence[Callable[[], Tensor]]:
        """Losses with gradients of the first batches with at least ``rows`` rows together, each computed when it is called."""
        return [partial(self.loss, number, None) for number in range(ceil(rows / self.batch_size))]


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

    network: Any  # a PeftModel; for an expert the denoiser itself

    def save(self, folder: Path) -> None:
        base = self.network.peft_config[self.network.active_adapter].base_model_name_or_path or ""
        save_peft_lora(folder, export_lora(self.network), base=base)


class AdapterOptions:
    """The options of a method: a frozen dataclass that inherits from this, with defaults for all fields; see `ADAPTERS`."""

    expert: ClassVar[bool] = False  # can train experts: switched off it is the base model, and it ends as plain LoRA
    frozen_base: ClassVar[bool] = False  # never changes a base weight, so that these may be kept in half precision
    adaptive: ClassVar[bool] = False  # its layers or ranks change while it trains
    forgets: ClassVar[bool] = False  # its start needs rows to forget, `AttachContext.forget`

    learning_rate: float  # of the optimizer's steps on the adapter, where the optimizer names none

    def attach(self, context: AttachContext) -> AdapterHandle:
        """Put the method on the network, trainable."""
        raise NotImplementedError  # abstract: each method attaches itself


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(AdapterOptions):
    """What every LoRA of one rank has: ``W + (alpha / rank) B A``."""

    convolutions: ClassVar[bool] = False  # also for convolutions wider than 1 x 1
    rank: int = 8
    alpha: float | None = None  # None is the rank: scale 1
    dropout: float = 0.0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(f"{owner}.rank", self.rank, low=1)
        check_range(f"{owner}.learning_rate", self.learning_rate, above=0)
        check_range(f"{owner}.dropout", self.dropout, low=0, high=1)
        if self.alpha is not None:
            check_range(f"{owner}.alpha", self.alpha, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        return LoraHandle(self.new_lora(context))

    def new_lora(self, context: AttachContext, **options: Any) -> Any:
        """A new LoRA on the network, trainable; ``options`` are peft's. The A of experts whose rank is fixed is `add_lora`'s."""
        if context.expert and not self.adaptive:
            add_lora(context.network, rank=self.rank, alpha=self.alpha, targets=context.targets, seed=context.seed)
            return context.network
        if not self.convolutions:
            refuse_wide(type(self).__name__, context.network, context.targets)
        alpha = self.rank if self.alpha is None else self.alpha
        return peft_lora(context, **{"r": self.rank, "lora_alpha": alpha, "lora_dropout": self.dropout, **options})


def refuse_wide(owner: str, network: nn.Module, targets: Sequence[str]) -> None:
    """Raises: UserError if a target is a convolution wider than 1 x 1, for a method whose maths is that of a linear layer."""
    for name, module in network.named_modules():
        wide = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        if wide and any(f".{name}".endswith(f".{target}") for target in targets):
            size = " x ".join(map(str, module.kernel_size))  # type: ignore[arg-type]
            raise UserError(
                f"The targets of {owner} must be linear modules or convolutions of 1 x 1, got {name}, a convolution of {size}. "
                "Leave it out, or use the adapter lora."
            )


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """One initialization; modules are named without peft's prefix."""

    method: str
    adapter: str
    roles: Mapping[str, str]  # module -> what it started from
    trainable: int  # numbers that the adapter trains
    keeps_function: bool  # does the model answer as before, up to rounding?
    keeps_base: bool  # are the base weights untouched, so that switching the adapter off gives the base model?
    skipped: tuple[str, ...] = ()  # modules on the meta device, left to a checkpoint


def adapter_bytes(folder: Path) -> int:
    """Size of the weight files that `AdapterHandle.save` wrote, in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")


def exported_numbers(network: nn.Module) -> int:
    """Numbers in the plain LoRA that is left."""
    return sum(lora.down.numel() + lora.up.numel() for lora in export_lora(network).values())


def attach_peft(context: AttachContext, config: PeftConfig) -> Any:
    """The network under peft's method, its start values drawn from the context's seed."""
    with seeded(context):
        return get_peft_model(context.network, config)  # type: ignore[arg-type]


def peft_lora(context: AttachContext, **options: Any) -> Any:
    """The network under a new LoRA as peft starts it, on the context's targets; ``options`` are peft's."""
    return attach_peft(context, LoraConfig(**{"target_modules": list(context.targets), **options}))


@contextmanager
def seeded(context: AttachContext, word: str = "adapter") -> Iterator[None]:
    """peft draws its start values from torch's global generator: seed it for this block only."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.generator(word).initial_seed())
        yield


def check_modules(method: str, saved: Collection[str], have: Collection[str], *, hint: str = "Use the same LoRA.") -> None:
    """Raises: UserError unless a state was saved for the modules that are there."""
    differing = sorted(set(saved) ^ set(have))
    if differing:
        raise UserError(f"{method}: the state was saved for other modules: {', '.join(differing[:4])}. {hint}")


def check_precision(name: str, tensors: Iterable[Tensor]) -> None:
    """Raises: TypeError for half precision, in which steps of 1e-3 and gains of 1e-5 are lost."""
    half = next((tensor.dtype for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise TypeError(f"{name} must stay in float32, got {half}. Change the model's dtype before the method is made.")


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
