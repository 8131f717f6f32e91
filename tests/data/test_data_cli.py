import json

import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.data import app
from valign.data.prompts.pairs import PromptPair, load_pairs
from valign.evaluation.suite_files import read_suite

ROWS = [
    {"prompt": "mean crow", "label": 1, "category": "Hate", "pair_id": "a", "kind": "explicit"},
    {"prompt": "kind crow", "label": 0, "category": "Hate", "pair_id": "a", "kind": "explicit"},
    {"prompt": "mean owl", "label": 1, "category": "Hate, Harrasment", "pair_id": "b", "kind": "implicit"},
    {"prompt": "kind owl", "label": 0, "category": "Hate", "pair_id": "b", "kind": "implicit"},
    {"prompt": "", "label": 1, "category": "Hate"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_read_counts_and_never_prints_a_prompt(file):
    text = run("read", file, "--against", file)
    assert "crow" not in text
    assert "4 prompts (2 unsafe, 2 safe), 2 distinct pairs" in text
    assert "1 pairs belong to several categories" in text
    assert "not used: 1 empty" in text
    assert "4 of 4 prompts (100.0%) stand in set.jsonl too" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("harassment")] == [
        ["harassment", "implicit", "1", "0", "1"]
    ]


def test_overlap_writes_what_is_left(file, tmp_path):
    train = tmp_path / "train.csv"
    train.write_text("prompt,label,category\nMEAN  crow,1,hate\n")
    text = run("overlap", train, file, "-o", tmp_path / "clean.jsonl")
    assert "1 of 4 test rows (25.0%; 1 distinct prompts) stand in train.csv" in text
    assert [json.loads(line)["prompt"] for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == [
        "kind crow",
        "mean owl",
        "kind owl",
    ]


def test_a_suite_is_what_overlap_writes(file, tmp_path):
    train = tmp_path / "train.csv"
    train.write_text("text\nMEAN  crow\n")
    run("overlap", train, file, "-o", tmp_path / "clean.jsonl", "--column", "prompt=text")
    suite = read_suite(tmp_path / "clean.jsonl")
    assert [(one.prompt, one.category, one.kind) for one in suite.prompts] == [
        ("kind crow", "", "benign"),  # a category on a safe row is not a finding
        ("mean owl", "harassment", "implicit"),
        ("kind owl", "", "benign"),
    ]
    text = run("read", tmp_path / "clean.jsonl", "--drop-missing")
    assert "3 prompts (1 unsafe, 2 safe), 1 distinct pairs" in text


def test_a_column_that_prompts_do_not_have_is_refused_with_a_guess(file):
    with pytest.raises(UserError, match=r"--column must name one of id, prompt, .*; got promt\. Did you mean 'prompt'\?"):
        run("read", file, "--column", "promt=prompt")


def test_build_from_a_file_and_a_new_sheet(file, tiny_sd, tmp_path):
    out = tmp_path / "data"
    text = run("build", "--model", tiny_sd, "-o", out, "--prompts", file, "--steps", "1", "--pairs", "0", "--device", "cpu")
    assert f"{out}: 2 pairs ready for training" in text.replace("\n", "")
    assert [line.split() for line in text.splitlines() if line.strip().startswith("hate")] == [["hate", "2", "2"]]
    assert [line.split() for line in text.splitlines() if line.strip().startswith("sexual")] == [["sexual", "0", "0"]]
    assert load_pairs(out / "prompts" / "pairs.parquet")[0] == PromptPair("a", "mean crow", "kind crow", ("hate",))
    run("sheet", out, "-o", tmp_path / "sheet.png", "--show-prompts")
    assert (tmp_path / "sheet.png").exists()
    assert (tmp_path / "sheet.png").read_bytes() != (out / "images" / "contact_sheet.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "file"], "--source file needs --prompts FILE"),
        (["--source", "chat"], "--source chat needs --endpoint URL and --chat-model NAME"),
        (["--source", "luck"], "source must be one of grammar, chat, file; got 'luck'"),
        (["--source", "grammar"], "has no grammar"),
        (["--prompts", __file__, "--column", "text"], "--column must be NAME=VALUE, got 'text'"),
        (["--prompts", __file__, "--column", "words=text"], "--column must name one of id, prompt"),
        (["--prompts", "nowhere.csv"], "--prompts nowhere.csv does not exist"),
        (["--policy", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tiny_sd, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        run("build", "--model", tiny_sd, "-o", tmp_path / "out", *arguments)
    assert message in str(caught.value)
