"""``valign train rl``, ``dpo`` and ``cosalign`` from start to end on a chat model in miniature, and what they refuse."""

import json

import pytest
from typer.testing import CliRunner

from chat_models import byte_tokenizer, tiny_llama
from valign.cli.root import build
from valign.models.language.loading import load_chat
from valign.models.language.scalar import new_scalar

ROWS = [
    {"prompt": f"say {word}", "harmful": place % 2, "demonstration": word}
    for place, word in enumerate(("ash", "bee", "cat", "dog"))
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["demonstration"], "rejected": "no"} for row in ROWS]
JUDGED = [
    {
        "prompt": row["prompt"],
        "risks": ["violence"] * row["harmful"],
        "answers": [
            {"text": row["demonstration"], "risks": ["violence"] * row["harmful"], "addressed": 1},
            {"text": "no", "risks": [], "addressed": 0},
        ],
    }
    for row in ROWS
]
SMALL = ["--steps", "1", "--prompts-per-step", "2", "--learning-rate", "1e-2"]


@pytest.fixture
def files(tmp_path):
    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer, window=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    new_scalar(load_chat(tmp_path / "model", device="cpu"), seed=0).save(tmp_path / "reward")
    for name, rows in (("prompts", ROWS), ("pairs", PAIRS), ("judged", JUDGED)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(files, command, data, *more):
    words = [
        "train",
        command,
        "--model",
        str(files / "model"),
        "--data",
        data,
        "--out",
        str(files / "run"),
        "--device",
        "cpu",
        *more,
    ]
    return CliRunner().invoke(build(), words)


def test_each_command_trains_and_prints_its_result(files):
    rl = [
        "--method",
        "grpo",
        "--reward",
        str(files / "reward"),
        "--adapter",
        "full",
        "--group",
        "3",
        "--answer-tokens",
        "4",
        *SMALL,
    ]
    done = run(files, "rl", str(files / "prompts.jsonl"), *rl)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 1
    files.joinpath("run").rename(files / "rl")
    done = run(files, "dpo", str(files / "pairs.jsonl"), "--adapter", "full", "--kl", "0.1", *SMALL)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"] == "dpo"
    files.joinpath("run").rename(files / "dpo")
    sft = ["--sft-steps", "1", "--sft-learning-rate", "1e-3", "--kl", "0.1"]
    done = run(files, "cosalign", str(files / "judged.jsonl"), *sft, *SMALL)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pairs"] == 16  # four prompts under four kinds of config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "magic"], "--method must be one of alphaalign"),
        (["--method", "grpo"], "must have a reward to follow"),
        (["--method", "grpo", "--reward", "demonstraton"], "--reward must be one of safety, format, refusal, demonstration"),
        (["--method", "safe-rlhf", "--reward", "safety", "--cost", "MODEL"], "must be a model with a scalar head"),
        (["--method", "grpo", "--reward", "safety", "--group", "1"], r"group must be in \[2"),
        (["--method", "alphaalign", "--answer-tokens", "500"], "must leave room for 500 tokens"),
        (["--method", "dr-irl"], "with a category and a demonstration, got none"),
    ],
)
def test_mistakes_are_refused_before_any_work(files, more, message):
    more = [str(files / "model") if word == "MODEL" else word for word in more]
    done = run(files, "rl", str(files / "prompts.jsonl"), *more)
    assert done.exception is not None
    with pytest.raises(ValueError, match=message):
        raise done.exception


def test_configs_name_the_policys_categories(files):
    done = run(files, "cosalign", str(files / "judged.jsonl"), "--set", "alpha=2")
    with pytest.raises(ValueError, match="must have alpha < gamma < beta"):
        raise done.exception
