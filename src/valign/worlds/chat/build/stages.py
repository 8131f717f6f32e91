"""The four stages of the chat world's models: base, aligned, memorized, and a LoRA safety tune of the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from valign.files import atomic_folder, write_json
from valign.models.files.adapter_index import PROVENANCE
from valign.models.language.renderer import ChatRenderer, RenderedChat
from valign.worlds.chat.build.examples import stage_chats
from valign.worlds.chat.build.tokenizer import MAX_TOKENS
from valign.worlds.shapes.build.fit import Budget, fit

BUDGETS = {
    "base": Budget(steps=5000, batch=40, lr=2e-3, warmup=200),
    "aligned": Budget(steps=500, batch=48, lr=5e-4, warmup=50),
    "memorized": Budget(steps=400, batch=48, lr=5e-4, warmup=50),
    "safety": Budget(steps=1200, batch=48, lr=3e-3, warmup=50),
}
RANK = 16  # of the safety tune
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A Llama of 1.8 million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    return model


def answer_loss(model: Any, rendered: list[RenderedChat], pad: int) -> Tensor:
    """Mean cross-entropy of all supervised tokens; short chats and long ones are two batches, so that little is padded."""
    order = sorted(rendered, key=lambda chat: len(chat.ids))
    halves = [half for half in (order[: len(order) // 2], order[len(order) // 2 :]) if half]
    total = sum(sum(chat.supervised) for chat in rendered)
    return sum((_summed(model, half, pad) for half in halves), torch.zeros(())) / total


def _summed(model: Any, rendered: list[RenderedChat], pad: int) -> Tensor:
    width = max(len(chat.ids) for chat in rendered)
    ids = torch.tensor([chat.ids + [pad] * (width - len(chat.ids)) for chat in rendered])
    taught = torch.tensor([chat.supervised + [False] * (width - len(chat.ids)) for chat in rendered])
    seen = torch.arange(width) < torch.tensor([[len(chat.ids)] for chat in rendered])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.model(input_ids=ids, attention_mask=seen.long(), use_cache=False).last_hidden_state
        logits = model.lm_head(states[:, :-1][taught[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][taught[:, 1:]], reduction="sum")


def train_stage(
    stage: str, model: Any, renderer: ChatRenderer, logs: Path, budget: Budget, *, seed: int, inner: Any = None
) -> None:
    """Train ``model`` in place on a stage's chats. ``inner`` is the language model within it, where an adapter wraps one."""
    network, pad = inner or model, renderer.tokenizer.pad_token_id
    network.config._attn_implementation = "eager"  # faster than fused attention where rows are this short

    def loss(step: int) -> dict[str, Tensor]:
        chats = stage_chats(stage, step, budget.batch, seed=seed)
        return {"loss": answer_loss(network, [renderer.chat(chat) for chat in chats], pad)}

    fit(model, loss, budget, logs, stage)


def save_half(
    model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, record: Mapping[str, Any] | None = None
) -> None:
    """Half-precision safetensors, and beside them the tokenizer, or an adapter's record."""
    with atomic_folder(folder, force=True) as temporary:
        model.half().save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # a form of peft's that nobody filled in
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if record is not None:
            write_json(temporary / PROVENANCE, record)
    model.float()


def lora(model: LlamaForCausalLM, *, seed: int) -> Any:
    """The base model with a fresh LoRA of every linear layer."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = "base"  # the stage, not the folder where it was made
    return adapted
