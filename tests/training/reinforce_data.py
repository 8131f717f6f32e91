"""A chat model in miniature and labelled prompts, for tests of reinforcement."""

from pathlib import Path

import torch

from chat_models import byte_tokenizer, tiny_llama
from valign.data.chats.reward_prompts import RewardPrompt
from valign.models.language.loading import LoadedChat
from valign.models.language.renderer import ChatRenderer
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.reinforce.config import ReinforceConfig

PROMPTS = [
    RewardPrompt((("user", f"say {word}"),), harmful, category, demonstration)
    for word, harmful, category, demonstration in (
        ("ash", True, "hate", "I cannot say ash."),
        ("bee", False, None, "bee"),
        ("cat", True, "violence", "I cannot say cat."),
        ("dog", False, None, "dog"),
        ("elk", True, "hate", "I cannot say elk."),
        ("fox", True, "violence", "I cannot say fox."),
    )
]


def tiny_chat(seed=0, layers=1):
    tokenizer = byte_tokenizer()
    model = tiny_llama(tokenizer, layers=layers, seed=seed).eval()
    return LoadedChat(model, ChatRenderer(tokenizer, model.generation_config), Path("tiny"))


def tiny_config(**changes):
    usual = {"steps": 2, "prompts": 2, "group": 4, "learning_rate": 1e-3, "answer_tokens": 6, "checkpoint_every": 1, "kl": 0.1}
    return ReinforceConfig(**usual | changes)


def full(**settings):
    return parse_tuning("full", settings)


def first_letter(prompts, outputs):
    """A reward for tests: the code of the output's first letter, 0 for none."""
    return torch.tensor([float(ord(output[0]) % 7) if output else 0.0 for output in outputs])
