"""FourierFT as peft has it (arXiv 2405.03003)."""

from dataclasses import dataclass

from peft import FourierFTConfig

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft


@dataclass(frozen=True, kw_only=True)
class FourierFtOptions(AdapterOptions):
    """Fourier coefficients at random fixed places."""

    n_frequency: int = 1000  # numbers per module
    scaling: float = 150.0
    from_zero: bool = True  # start as the base model; False is the paper's normal start, too much for narrow weights
    learning_rate: float = 1e-2

    def attach(self, context: AttachContext) -> AdapterHandle:
        numbers = {"n_frequency": self.n_frequency, "scaling": self.scaling, "init_weights": self.from_zero}
        seed = context.generator("places").initial_seed() % 2**31
        config = FourierFTConfig(target_modules=list(context.targets), random_loc_seed=seed, **numbers)  # type: ignore[arg-type]
        return AdapterHandle(attach_peft(context, config))
