"""Run by the tests in processes of its own: ``OUT``; a chat model learns a skill and is held to its refusals."""

import sys
from pathlib import Path

import torch

from valign.data.chats import Conversation
from valign.data.tasks.base import Task, TaskData
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preserving import PreserveData, parse_preserving
from valign.training.tasks.supervised import SupervisedConfig, finetune
from valign.worlds.chat import model_folder
from valign.worlds.chat.grammar import ChatGrammar


def conversations(chats):
    return tuple(Conversation(tuple((turn["role"], turn["content"]) for turn in chat)) for chat in chats)


def main(out):
    torch.set_num_threads(1)
    rows, grammar = conversations(ChatGrammar().task_chats("counting", 24, 0)), ChatGrammar()
    return finetune(
        ChatTaskModel(load_chat(model_folder("aligned"), device="cpu", dtype="float32"), max_tokens=192),
        TaskData(Task(name="chat", kind="chat", score="loss"), rows[4:], rows[:4]),
        Path(out),
        parse_tuning("lora", {"rank": 2, "learning_rate": 1e-3}),
        SupervisedConfig(steps=3, batch_size=6, validate_every=2, checkpoint_every=2),
        preserve=parse_preserving("agl+kl")[0],
        beside=PreserveData(calibration=conversations(grammar.calibration(6, 0))),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
