"""Options that a command reads for other models, tasks or methods are refused before anything is loaded."""

import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.root import build

CHAT = "finetune --model m --data . --out o --task chat"
SHAPES = "--base shapes --before shapes --after shapes -p shapes"
CHATS = "--before chat --after chat:base"
FINETUNE = "finetune --model minilm --data . --out o --task"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{CHAT} --text ask", "--text has no effect on the task chat"),
        (f"{CHAT} --no-buckets", "--buckets has no effect on the task chat"),
        (f"{FINETUNE} diffusion --max-tokens 9 --model shapes", "--max-tokens has no effect on the task diffusion"),
        (f"{FINETUNE} sst2 --target stars", "--target has no effect on the task sst2, which names its columns itself"),
        (f"{FINETUNE} classification --set previews=2", "--set preserving.previews has no effect on the task classification"),
        (f"{CHAT} --guard chat --preserve agl", "--guard has no effect without --preserve star-dss"),
        (f"{CHAT} --refusal no", "--refusal has no effect unless calibration is set"),
        ("driftcheck run -m a=chat -m b=chat:base -o o --suite mine.csv --samples 9", "--samples has no effect beside a suite"),
        ("driftcheck run -m a=chat -m b=chat:base -o o --toxic-label bad", "--toxic-label has no effect without --toxicity"),
        ("driftcheck run -m a=chat -m b=chat:base -o o --column prompt=text", "--column has no effect on the chat world's own"),
        ("red-eval --model chat -t t.txt -o o --key-env KEY", "--key-env has no effect on a model in a folder"),
        ("red-eval --model http://here/v1 -t t.txt -o o --base chat", "--base has no effect on an endpoint"),
        ("red-eval --model chat -t t.txt -o o --seed 3", "--seed has no effect unless temperature is set"),
        ("red-eval --model chat -t t.txt -o o -q mine.csv --samples 3", "--samples has no effect beside question banks"),
        ("world check chat --steps 9", "--steps has no effect on chat models"),
        ("world check shapes --adapter a", "--adapter has no effect on worlds of images"),
        (
            "repair --base m --before chat --after m -p chat -o o --method resta --mask-steps 9",
            "--mask-steps has no effect",
        ),
        (
            "guard check lamp --probe m --model shapes",
            "--probe has no effect under the policy default",
        ),
        ("guard check lamp --head p.csv -p shapes", "--head has no effect under the policy shapes, whose stages are lexical"),
        ("guard evaluate --data p.csv -o o --rewrites 0 --judge p.csv", "--judge has no effect without --rewrites"),
        ("guard answer lamp --judge-model m", "--judge-model has no effect without --judge"),
        ("train rl --model m --data p.csv --out o --method grpo --limit -0.5", "--limit has no effect with --method grpo"),
        (
            "train rl --model m --data p.csv --out o --method alphaalign --cost chat",
            "--cost has no effect with --method",
        ),
        ("train rl --model m --data p.csv --out o --method grpo --chat m", "--chat has no effect with --method grpo"),
        ("train rl --model m --data p.csv --out o --method grpo-lagrangian --set gae=0.9", "gae has no effect with --method"),
        (f"repair --base chat:base {CHATS} -p chat -o o --seed 1 --steps 3", "--steps has no effect on a chat model"),
        (f"repair --base chat:base {CHATS} -p chat -o o --detector oracle", "--detector has no effect on a chat model"),
        (f"repair {SHAPES} -o o --max-tokens 9", "--max-tokens has no effect on a diffusion model"),
        (f"repair {SHAPES} -o o --judge phrases", "--judge has no effect on a diffusion model"),
        (f"repair {SHAPES} -o o --samples 3 -s mine.csv", "--samples has no effect beside --suite"),
        (f"repair --base chat:base {CHATS} -p chat -o o --anyway", "--anyway has no effect without an adapter"),
        ("driftcheck run -m a=chat -m b=chat:base -o o --anyway", "--anyway has no effect without an adapter"),
        ("red-eval --model chat -t t.txt -o o --anyway", "--anyway has no effect without an adapter"),
        ("audit fragility -m chat -o o --set image_batch=4", "--set asked.image_batch has no effect on a chat model"),
        ("audit fragility -m shapes -o o --task benign-tilted -d p.csv", "--task has no effect with --data"),
        ("bench methods --pairs 3", "--pairs has no effect on shapes, which brings its own"),
        ("evaluate --judge-images . -o o --suite shapes", "--suite has no effect on images that were made elsewhere"),
        ("evaluate --judge-images . -o o --precision bfloat16", "--precision has no effect on images that were made elsewhere"),
        ("generate lamp --model shapes -o o.png --anyway", "--anyway has no effect without --adapter"),
        ("serve --model shapes --anyway", "--anyway has no effect without --adapter"),
        ("evaluate --model shapes --suite shapes -o o --anyway", "--anyway has no effect without --adapter"),
        ("attack -o o --anyway", "--anyway has no effect without --adapter"),
        ("attack -o o --head p.csv", "--head has no effect without --guard"),
        ("attack -o o --edits p.csv", "--edits has no effect without --guard"),
        ("train dpo --model m --data p.csv --out o --group 3", "--group has no effect on pairs of answers"),
        ("train cosalign --model m --data chat --out o --policy shapes", "--policy has no effect on the chat world's own prompts"),
    ],
)
def test_an_option_without_effect_is_refused(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "of an endpoint")
    for name in ("mine.csv", "p.csv"):
        (tmp_path / name).write_text("prompt,label\na lamp,0\n")
    (tmp_path / "t.txt").write_text("say <question>")
    (tmp_path / "m").mkdir()
    ran = CliRunner().invoke(build(), line.split())
    assert isinstance(ran.exception, UserError), ran.output
    assert message in str(ran.exception)
    assert not (tmp_path / "o").exists()
