"""``valign train prompt-optimizer`` and ``valign prompt optimize`` on a chat model in miniature, and what they refuse."""

import json

import pytest
from typer.testing import CliRunner

from chat_models import byte_tokenizer, tiny_llama
from valign.cli.root import build
from valign.guard import Guard

RISKY = "a flame on a hill"


@pytest.fixture
def files(tmp_path):
    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer, window=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "requests.txt").write_text(f"{RISKY}\na red cup in the fog\na blue fish\n")
    return tmp_path


def run(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(build(), [str(word) for word in words])


def train(files, *more):
    given = ["--model", files / "model", "--requests", files / "requests.txt", "-p", "shapes", "--out", files / "run"]
    return run("train", "prompt-optimizer", *given, "--sft-steps", 1, "--steps", 1, "--max-tokens", 8, "--candidates", 2, *more)


def optimize(folder, *more):
    return run("prompt", "optimize", RISKY, "--optimizer", folder, "-p", "shapes", "--max-tokens", 8, *more)


def test_a_run_is_an_optimizer_whose_prompts_must_pass_the_guard(files):
    result = train(files, "--feedback", "text", "--kl", "0.1")
    assert result.exit_code == 0, str(result.exception)
    assert "The judge finds only 0 of 1 prompts for held-out requests good" in result.stderr
    made = json.loads(result.stdout)
    assert (made["text_pairs"], made["image_pairs"], made["held_out"]) == (2, 0, 1)
    written = optimize(files / "run")
    assert written.stdout.strip() == Guard.from_policy("shapes").guard(RISKY).prompt  # it has learnt nothing: the guard's own
    assert "the optimizer's prompt was not used" in written.stderr
    (shown,) = [json.loads(line) for line in optimize(made["model"], "--json").stdout.splitlines()]
    assert [attempt["accepted"] for attempt in shown["attempts"]] == [False, True]


def test_animations_without_a_pair_leave_the_model_of_sft(files):
    given = ("--feedback", "image", "--image-model", "shapes", "--detector", "oracle", "--image-steps", 1, "--frames", 2)
    result = train(files, *given)
    assert result.exit_code == 0, str(result.exception)
    assert "No pairs were found" in result.stderr
    assert json.loads(result.stdout)["model"].endswith("sft/adapter")
    assert optimize(files / "run").exit_code == 0
    again = train(files, *given[:-1], 3)
    assert "images.frames was 2 and is now 3" in str(again.exception)


def test_what_it_refuses(files):
    def refused(result):
        return str(result.exception)

    images = ("--image-model", "shapes", "--detector", "oracle")
    assert "reads no images, got --image-model" in refused(train(files, "--feedback", "text", *images))
    assert "--frames has no effect unless image_model is set" in refused(train(files, "--feedback", "text", "--frames", 2))
    (files / "run").mkdir()
    (files / "run" / "run.json").write_text(json.dumps({"step": "prompt-optimizer", "status": "running"}))
    assert "is not finished" in refused(optimize(files / "run"))
    assert "does not exist" in refused(optimize(files / "nowhere"))
