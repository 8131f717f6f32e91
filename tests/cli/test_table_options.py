"""``--column`` and ``--fill`` on every command that reads a table."""

import typer
from typer.main import get_command

from valign.cli.common import TableOptions
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
