"""One string names a way to fine-tune: ``ADAPTER[+OPTIMIZER][+PERTURBATION]``, with options as ``NAME=VALUE``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from valign.adapters import ADAPTERS, AdapterOptions
from valign.checks import UserError, close_to, read_options
from valign.optimizers.adamw import AdamWOptions
from valign.optimizers.adamw_eight_bit import AdamWEightBitOptions
from valign.optimizers.base import OptimizerOptions
from valign.optimizers.perturbation import PerturbationOptions
from valign.optimizers.registry import OPTIMIZERS, PERTURBATIONS


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """An adapter, the optimizer that trains it, and what perturbs it meanwhile."""

    name: str
    adapter: AdapterOptions
    optimizer: OptimizerOptions
    perturbation: PerturbationOptions | None = None

    @property
    def learning_rate(self) -> float:
        """Of the adapter's parameters at its height."""
        return self.adapter.learning_rate if self.optimizer.learning_rate is None else self.optimizer.learning_rate

    def at(self, factor: float) -> "Tuning":
        """The same with every learning rate multiplied."""

        def scaled(part: Any) -> Any:
            return part if part.learning_rate is None else replace(part, learning_rate=factor * part.learning_rate)

        return replace(self, adapter=scaled(self.adapter), optimizer=scaled(self.optimizer))

    def eight_bit(self) -> "Tuning":
        """The same with AdamW's state in 8 bits a number. Raises: UserError for another optimizer."""
        own = self.optimizer
        if isinstance(own, AdamWEightBitOptions):
            return self
        if type(own) is not AdamWOptions:
            raise UserError(
                f"memory.eight_bit is the state of adamw, got the method {self.name!r}, which names another. Leave one of them out."
            )
        AdamWEightBitOptions().check_installed()
        options = AdamWEightBitOptions(learning_rate=own.learning_rate, weight_decay=own.weight_decay, betas=own.betas)
        return replace(self, optimizer=options)

    def recipe(self) -> dict[str, Any]:
        """JSON-able; all that shapes the result."""
        parts = {"adapter": self.adapter, "optimizer": self.optimizer, "perturbation": self.perturbation}
        return {"name": self.name, **{key: part and asdict(part) for key, part in parts.items()}}  # type: ignore[call-overload]


def parse_tuning(text: str, settings: Mapping[str, Any] | None = None) -> Tuning:
    """``"lora"``, ``"full+dct-adamw"``, ``"lora+mgpo"``; ``settings`` are fields of the parts by name.

    A name that several parts have is the first one's; ``"dct-adamw.rank"`` is that part's.
    Raises: UserError for an unknown part (with all known ones), two of one kind, an unknown option, or a value of the wrong type or
        range.
    """
    names = text.split("+")
    kinds = (ADAPTERS, OPTIMIZERS, PERTURBATIONS)
    found: dict[int, str] = {}
    for place, name in enumerate(names):
        kind = next((number for number, table in enumerate(kinds) if name in table), None)
        if kind is None or kind in found or (place == 0) != (kind == 0):
            raise UserError(
                f"method must be ADAPTER[+OPTIMIZER][+PERTURBATION], got {text!r}.{close_to(name, kinds[0])} "
                f"Adapters: {', '.join(ADAPTERS)}; "
                f"optimizers: {', '.join(OPTIMIZERS)}; perturbations: {', '.join(PERTURBATIONS)}."
            )
        found[kind] = name
    found.setdefault(1, "adamw")
    parts = {found[kind]: kinds[kind][found[kind]] for kind in sorted(found)}
    options = _sorted_out(parts, settings or {})
    made: dict[str, Any] = {name: read_options(part, options[name], name=name) for name, part in parts.items()}
    made[found[1]].check_installed()
    return Tuning(
        name=text,
        adapter=made[found[0]],
        optimizer=made[found[1]],
        perturbation=made[found[2]] if 2 in found else None,
    )


def _sorted_out(parts: Mapping[str, type[Any]], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each part."""
    known = {name: [field.name for field in fields(part)] for name, part in parts.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for key, value in settings.items():
        part, _, option = key.rpartition(".")
        owners = [name for name in parts if option in known[name] and part in ("", name)]
        if not owners:
            listed = "; ".join(f"{name}: {', '.join(options)}" for name, options in known.items())
            guess = close_to(option, [field for options in known.values() for field in options])
            raise UserError(f"--set must name an option of the method, got {key!r}.{guess} Known: {listed}.")
        found[owners[0]][option] = value
    return found
