"""valign: one policy for a generative image model, enforced in training, enforced at inference, and measured.

The names in ``__all__`` are the public interface; each is imported when it is first asked for, so that ``import valign`` takes no
time. Everything else may change with any minor version. A public name that goes or changes its meaning gives a `DeprecationWarning`
for at least one minor version before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from valign.moved import install

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers and for the reference
    from valign.adapters import initialize as initialize
    from valign.checks import UserError as UserError
    from valign.editing.uce import ConceptEdit as ConceptEdit
    from valign.editing.uce import edit_concepts as edit_concepts
    from valign.evaluation import Evaluators as Evaluators
    from valign.evaluation import Suite as Suite
    from valign.evaluation import adapter_system as adapter_system
    from valign.evaluation import base_system as base_system
    from valign.evaluation import evaluate as evaluate
    from valign.guard import Guard as Guard
    from valign.guard import GuardedPipeline as GuardedPipeline
    from valign.interfaces import SamplingConfig as SamplingConfig
    from valign.merging import Expert as Expert
    from valign.merging.co_merge import co_merge as co_merge
    from valign.merging.regmean import regmean as regmean
    from valign.models.diffusion.loading import load_model as load_model
    from valign.models.diffusion.lora import load_adapter as load_adapter
    from valign.models.diffusion.sampling import generate as generate
    from valign.models.files.adapter_files import open_adapter as open_adapter
    from valign.models.files.adapter_files import save_adapter as save_adapter
    from valign.objectives import DiffusionDPO as DiffusionDPO
    from valign.objectives import LiVO as LiVO
    from valign.policy import Policy as Policy
    from valign.policy import load_policy as load_policy
    from valign.recipes.align import AlignConfig as AlignConfig
    from valign.recipes.align import align as align
    from valign.recipes.quickstart import quickstart as quickstart
    from valign.worlds import world as world

__version__ = "0.1.0"

_HOMES = {  # public name: the module that defines it
    "AlignConfig": "valign.recipes.align",
    "ConceptEdit": "valign.editing.uce",
    "DiffusionDPO": "valign.objectives",
    "Evaluators": "valign.evaluation",
    "Expert": "valign.merging",
    "Guard": "valign.guard",
    "GuardedPipeline": "valign.guard",
    "LiVO": "valign.objectives",
    "Policy": "valign.policy",
    "SamplingConfig": "valign.interfaces",
    "Suite": "valign.evaluation",
    "UserError": "valign.checks",
    "adapter_system": "valign.evaluation",
    "align": "valign.recipes.align",
    "base_system": "valign.evaluation",
    "co_merge": "valign.merging.co_merge",
    "edit_concepts": "valign.editing.uce",
    "evaluate": "valign.evaluation",
    "generate": "valign.models.diffusion.sampling",
    "initialize": "valign.adapters",
    "load_adapter": "valign.models.diffusion.lora",
    "load_model": "valign.models.diffusion.loading",
    "load_policy": "valign.policy",
    "open_adapter": "valign.models.files.adapter_files",
    "quickstart": "valign.recipes.quickstart",
    "regmean": "valign.merging.regmean",
    "save_adapter": "valign.models.files.adapter_files",
    "world": "valign.worlds",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
