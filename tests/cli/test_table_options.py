"""``--column`` and ``--fill`` on every command that reads a table."""

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.common import PromptTableOptions, TableOptions
from valign.cli.early import refuse_other_tables
from valign.cli.options import Configured
from valign.cli.root import build
from valign.data.prompts.tables import TableReading
from valign.merging.realign import Realignment, preferences

READ = """align, attack, audit fragility, bench head, bench methods, check, data build, data overlap, data read, driftcheck run,
evaluate, finetune, guard answer, guard calibrate, guard check, guard evaluate, guard explain, guard fit, guard
fit-rewriter, guard rewrite, guidelines build, merge co-merge, merge regmean, realign somf, red-eval, repair, train
cosalign, train dpo, train hysac, train prompt-optimizer, train retriever, train rl"""


def has_table(command):
    parts = command.parts.values() if isinstance(command, Configured) else ()
    return any(isinstance(part, type) and issubclass(part, TableOptions) for part in parts)


def walk(command, name=""):
    if isinstance(command, typer.core.TyperGroup):
        context = typer.Context(command)
        for word in command.list_commands(context):
            yield from walk(command.get_command(context, word), f"{name} {word}".strip())
    else:
        yield name, command


def test_what_reads_a_table_takes_its_columns():
    found = {name for name, command in walk(get_command(build())) if has_table(command)}
    assert found == set(READ.replace("\n", " ").split(", "))


def test_a_realignment_reads_pairs_of_other_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "_root", lambda opened: None)
    monkeypatch.setattr(preferences, "_is_diffusion", lambda root: False)
    (tmp_path / "own.csv").write_text("ask,chosen,rejected\nhow?,no,so\n")
    reading = TableReading(columns={"prompt": "ask"})
    (pair,) = preferences.read_preferences(Realignment.__new__(Realignment), tmp_path / "own.csv", known=(), reading=reading)
    assert pair.safe.turns == (("user", "how?"), ("assistant", "no"))


def columns_given(command, monkeypatch, place, *more):
    """The readings that a command hands on, with a column of each of its tables named."""
    seen = {}

    def stop(*_, **given):
        seen.update(given)
        raise SystemExit(0)

    monkeypatch.setattr(place, stop)
    words = [word for one in ("prompt=ask", *more) for word in ("--column", one)]
    arguments = [command, "--before", "chat", "--after", "chat:base", "--policy", "chat", "-o", "out", *words]
    return CliRunner().invoke(build(), arguments + (["--base", "chat:base"] if command == "repair" else [])), seen


def test_a_repair_reads_pairs_and_prompts_of_other_columns(monkeypatch):
    ended, seen = columns_given("repair", monkeypatch, "valign.recipes.repair.repair", "chosen=good", "rejected=bad")
    assert ended.exit_code == 0, ended.output
    assert seen["pairs_reading"].columns == {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert seen["pairs_reading"].strict  # the only table of the command
    assert seen["reading"].columns == {"prompt": "ask"}


def test_a_repair_hands_the_names_of_columns_to_its_pairs(tmp_path, monkeypatch):
    from valign.policy import load_policy
    from valign.recipes.repair import repair

    (tmp_path / "own.csv").write_text("ask,chosen,rejected\nhow?,no,no\n")
    reading = TableReading(columns={"prompt": "ask"})
    with pytest.raises(ValueError, match=r"row 1 must have two answers to one conversation, got the same answer twice"):
        repair(
            "chat",
            "chat:base",
            load_policy("chat"),
            tmp_path / "out",
            base="chat:base",
            pairs=tmp_path / "own.csv",
            pairs_reading=reading,
        )


def test_a_check_reads_labelled_answers_of_other_columns(monkeypatch):
    ended, seen = columns_given("check", monkeypatch, "valign.recipes.check.check", "answer=reply", "harmful=bad")
    assert ended.exit_code == 0, ended.output
    assert seen["reading"].beside().columns["answer"] == "reply"
    ended, _ = columns_given("check", monkeypatch, "valign.recipes.check.check", "anwser=reply")
    assert ended.exit_code != 0


def test_columns_of_a_second_table_are_not_looked_for_in_the_first():
    whole = TableReading(columns={"prompt": "ask", "answer": "reply"}, fill={"label": 1})
    assert whole.without(("answer",)) == TableReading(columns={"prompt": "ask"}, fill={"label": 1})


def test_another_table_has_names_of_its_own():
    given = PromptTableOptions(column=("prompt=ask", "suite.prompt=text", "suite.label=bad"))
    reading = given.reading()
    assert reading.columns == {"prompt": "ask"}
    assert reading.beside("suite").columns == {"prompt": "text", "label": "bad"}
    assert reading.beside("retain").columns == {"prompt": "ask"}
    with pytest.raises(UserError, match=r"--column must name one of .*; got promt\. Did you mean 'prompt'"):
        PromptTableOptions(column=("suite.promt=text",)).reading()
    with pytest.raises(
        UserError, match=r"^--column suit\.prompt=text must name a table's option .*, got suit\. Did you mean '--suite'"
    ):
        refuse_other_tables(["--column", "suit.prompt=text"], ["--suite", "--retain"])
    refuse_other_tables(["--column=suite.prompt=text", "--column", "prompt=a.b"], ["--suite"])
