"""trl's DPOTrainer as the part of a training that gives the gradients of pairs of answers; our renderer and engine do the rest."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from valign.models.language.loading import LoadedChat


class PreferenceTrainer(DPOTrainer):
    """Takes rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` as they are: nothing is rendered a second time."""

    def __init__(self, network: Any, loaded: LoadedChat, reference: Any, *, beta: float, accumulation: int, folder: Path) -> None:
        tokenizer = loaded.renderer.tokenizer
        arguments = DPOConfig(
            output_dir=str(folder / "trl"),  # nothing is written there
            beta=beta,
            max_length=None,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=next(network.parameters()).device.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        adapted = isinstance(network, PeftModel)
        super().__init__(
            model=network,
            ref_model=None if adapted else reference,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}]),
            processing_class=tokenizer,
        )
        if adapted:  # an adapter that is switched off need not be the model as it was
            self.ref_model = reference
            add_fused_lm_head(reference)
        self.current_gradient_accumulation_steps = accumulation
        self.collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset
