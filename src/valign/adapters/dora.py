"""DoRA as peft has it (arXiv 2402.09353)."""

from dataclasses import dataclass

from valign.adapters.base import AdapterHandle, AttachContext, LowRankOptions


@dataclass(frozen=True, kw_only=True)
class DoraOptions(LowRankOptions):
    """A magnitude per output beside LoRA's direction."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        return AdapterHandle(self.new_lora(context, use_dora=True))
