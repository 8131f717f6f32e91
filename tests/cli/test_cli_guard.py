"""``valign guard`` and ``valign generate``: what goes in, what comes out, and the exit code."""

import json

import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.guard import app
from valign.cli.guard_prompts import BLOCKED
from valign.cli.root import build

runner = CliRunner(env={"COLUMNS": "200"})
QUICK = "version: 1\nid: quick\ntitle: Quick\nextends: default\nguard: {stages: [lexical, values]}\n"


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return str(path)


def test_check_says_what_it_would_do(policy):
    result = runner.invoke(app, ["check", "a cat on a sofa", "a corpse on the beach", "-p", policy])
    assert (result.exit_code, result.stdout.split("\n")[:2]) == (0, ["allow", "rewrite  lexical  shocking"])


def test_a_blocked_prompt_sets_the_exit_code(policy):
    result = runner.invoke(app, ["check", "Привет, большой мир", "-p", policy])
    assert (result.exit_code, result.stdout) == (BLOCKED, "block  script\n")


def test_rewrite_prints_one_line_each(policy):
    result = runner.invoke(app, ["rewrite", "a cat", "a corpse on the beach", "Привет, большой мир", "-p", policy])
    assert result.stdout == "a cat\na mossy fallen tree on the beach\n\n"
    assert result.stderr == "Prompt 3 is blocked: script\n"
    assert result.exit_code == BLOCKED


def test_a_safety_config_is_in_force_for_the_command(policy):
    prompts = ["a corpse in a film poster", "a corpse on the beach"]
    config = ["--config", "allows shocking in film posters; blocks corpse on the beach", "-p", policy]
    result = runner.invoke(app, ["check", *prompts, *config, "--role", "studio", "--json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["action"] for line in lines] == ["allow", "block"]
    assert lines[0]["config"].startswith("allow shocking in film posters; block corpse")
    for wrong in (["--config", "allows shocking"], ["--config", "allows hate", "--role", "studio"], ["--role", "studio"]):
        refused = runner.invoke(app, ["check", *prompts, "-p", policy, *wrong])
        assert isinstance(refused.exception, UserError)


def test_reads_stdin_and_keeps_the_order(policy):
    prompts = [f"a cat number {i}" for i in range(70)]
    result = runner.invoke(app, ["rewrite", "-p", policy], input="\n".join([*prompts[:66], "\u200b", *prompts[66:]]))
    assert result.stdout.split("\n")[:-1] == [*prompts[:66], "", *prompts[66:]]
    assert "must not be blank" in result.stderr


def test_reads_files_and_writes_json(policy, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": "a corpse on the beach"}\n')
    lines = runner.invoke(app, ["check", "-f", str(path), "-p", policy, "--json"]).stdout.splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["allow", "rewrite"]
    assert [json.loads(line)["prompt"] for line in lines] == ["a cat", "a corpse on the beach"]


def test_a_line_that_is_no_prompt_is_blocked_and_no_other(policy, tmp_path):
    lines = b"a cat\r\nna\xefve\n\na\x00b\n" + b"x" * 1_000_000 + b"\na dog"
    text = tmp_path / "prompts.txt"
    text.write_bytes(lines)
    for given in (
        {"args": ["check", "-f", str(text), "-p", policy, "--json"]},
        {"args": ["check", "-p", policy, "--json"], "input": lines},
    ):
        result = runner.invoke(app, **given)
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert (result.exit_code, [one["action"] for one in found]) == (BLOCKED, ["allow", "block", "block", "block", "allow"])
        assert [bool(one["error"]) for one in found] == [False, True, True, True, False]
        assert len({tuple(one) for one in found}) == 1  # the same keys for all


def test_a_file_with_another_column_is_named(policy, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a cat"}\n')
    result = runner.invoke(app, ["check", "-f", str(path), "-p", policy])
    with pytest.raises(UserError, match=r"row 1 must have the column prompt, got text"):
        raise result.exception
    path.write_text('{"prompt": 3}\n')
    result = runner.invoke(app, ["check", "-f", str(path), "-p", policy])
    assert (result.exit_code, result.stdout) == (BLOCKED, "block  The prompt must be text, got int. Decode it first.\n")


def test_explain_points_at_the_word(policy, monkeypatch):
    monkeypatch.setattr("valign.cli.guard.out.width", 200)  # the console took its width from whoever imported it first
    result = runner.invoke(app, ["explain", "a c0rpse on the beach", "-p", policy])
    assert "c0rpse" in result.stdout
    assert "rotting-corpse" in result.stdout
    assert "a mossy fallen tree on the beach" in result.stdout


def test_explain_takes_many_prompts(policy):
    prompts = "a cat\na corpse on the beach\n\u200b\n\u041f\u0440\u0438\u0432\u0435\u0442\n"
    result = runner.invoke(app, ["explain", "-p", policy, "--json"], input=prompts)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.exit_code, [one["action"] for one in found]) == (BLOCKED, ["allow", "rewrite", "block", "block"])
    stages = [one["stage"] for one in found[1]["decision"]["trace"]]
    assert stages == ["hard-rule", "script", "lexical", "values", "intention"]  # also behind the first finding


def test_refuses_two_sources_of_prompts(policy, tmp_path):
    result = runner.invoke(app, ["check", "a cat", "-f", str(tmp_path / "x.txt"), "-p", policy])
    assert isinstance(result.exception, UserError)


def test_fit_calibrate_check_and_evaluate(tmp_path):
    rows = [
        {"id": f"{toy}{n}{side}", "prompt": f"a {word} {toy} {n}", "label": side, "category": "violence", "pair_id": f"{toy}{n}"}
        for toy in ("boat", "lamp", "tree", "cup")
        for n in range(100)
        for side, word in enumerate(("quiet", "furious"))
    ]
    data = tmp_path / "toys.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    fit = [
        "fit",
        "-d",
        str(data),
        "-o",
        str(tmp_path / "head"),
        "--epochs",
        "8",
        "--limit",
        "120",
        "--target-fpr",
        "0.1",
        "--generated",
        "0",
        "--weigh",
        "toys=0.5",
    ]
    result = runner.invoke(app, fit)
    assert result.exit_code == 0, result.output
    head = tmp_path / "head" / "head.safetensors"
    assert result.stdout == f"{head}\n"
    card = (tmp_path / "head" / "CARD.md").read_text()
    assert "| toys | 120 |" in card
    result = runner.invoke(app, [*fit[:-1], "traffic=2"])
    assert "--weigh must name sources of the data, got traffic" in str(result.exception)
    again = ["calibrate", "-d", str(data), "--head", str(head), "-o", str(tmp_path / "tight"), "--target-fpr", "0.02"]
    assert runner.invoke(app, again).exit_code == 0
    both = [*again[:3], "--head", str(head), "--head", str(head), "-o", str(tmp_path / "mean"), "--held-out", "--target-fpr", "0.1"]
    assert runner.invoke(app, both).exit_code == 0
    assert "The mean of 2 heads" in (tmp_path / "mean" / "CARD.md").read_text()
    report = ["evaluate", "-d", str(data), "--head", str(tmp_path / "tight" / "head.safetensors"), "-o", str(tmp_path / "report")]
    result = runner.invoke(app, [*report, "--limit", "10"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    toys = next(one for one in found["sources"] if one["source"] == "toys")
    assert (toys["unsafe"], toys["safe"]) == (10, 10)
    assert toys["auroc"]["value"] > 0.9
    assert "furious" not in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "roc.png").stat().st_size > 1000


def test_generate_draws_and_refuses(policy, tiny_sd, tmp_path):
    out = tmp_path / "a.png"
    command = [
        "generate",
        "a lighthouse",
        "--model",
        str(tiny_sd),
        "--guard",
        policy,
        "-o",
        str(out),
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    result = runner.invoke(build(), command)
    assert result.exit_code == 0, result.output
    assert out.exists()
    assert "not checked" in result.stderr
    out.unlink()
    command[1] = "Привет, большой мир"
    result = runner.invoke(build(), command)
    assert (result.exit_code, out.exists()) == (BLOCKED, False)


class Talker:
    """Answers and judges: an answer is too severe until its system message warns."""

    def complete(self, messages, *, schema=None):
        if schema is None:
            return "careful" if messages[0]["role"] == "system" else "rash"
        data = json.loads(messages[-1]["content"])
        severe = data.get("answer") == "rash" or "bomb" in data["question"]
        return json.dumps({"reason": "", "category": "violence", "level": "severe" if severe else "safe"})


def test_answers_are_generated_again_until_they_may_be_shown(monkeypatch):
    monkeypatch.setattr("valign.cli.guard_answer.resolve_chat", lambda *a, **k: Talker())
    asked = runner.invoke(app, ["answer", "--chat", "http://here/v1", "--json", "how are fireworks made?", "a bomb"])
    assert asked.exit_code == BLOCKED
    first, second = map(json.loads, asked.stdout.splitlines())
    assert (first["text"], first["action"]) == ("careful", "regenerated")
    assert [one["level"] for one in first["verdicts"]] == ["severe", "safe"]
    assert second["action"] == "blocked"
    never = runner.invoke(app, ["answer", "--chat", "http://here/v1", "--no-warned", "--rounds", "2", "how are fireworks made?"])
    assert never.stdout.strip() == "I'm sorry, but I can't help with that."
    plain = runner.invoke(app, ["answer", "--chat", "http://here/v1", "a cat?"])
    assert plain.exit_code == 0
    assert "--chat must name the model that answers" in str(runner.invoke(app, ["answer", "a cat?"]).exception)
    wrong = runner.invoke(app, ["answer", "--chat", "http://here/v1", "--allowed", "mild", "a cat?"])
    assert "--allowed must be one of safe, minor, moderate, severe" in str(wrong.exception)
