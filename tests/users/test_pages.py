"""The pages for users run from start to end: every command of their bash blocks, in order, in an empty folder."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from valign.cli.root import build

MADE = {  # what a page leaves behind
    "host": ("runs/host/evaluation/report.html", "runs/host/merged/adapter/README.md", "first.png", "keys.txt"),
    "researcher": ("detectors/probe/detector.json", "unseen.jsonl", "runs/paper/report.html", "runs/elsewhere/summary.json"),
    "fine-tuner": ("runs/style/adapter", "runs/kept/adapter", "star.png", "runs/check/report.html", "runs/check/junit.xml"),
}
# values of options, so that the test is short
SHORT = {"--steps": "2", "--limit": "8", "--count": "2", "--samples": "2", "--max-drift": "0.5"}
PAGES = sorted((Path(__file__).parents[2] / "docs" / "users").glob("*.md"))


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_page_ends_well_and_leaves_what_it_says(page, tmp_path, few_shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALIGN_PROGRESS", "0")
    for line in commands(page):
        words = shlex.split(line)
        assert words[0] == "valign", line
        words = [SHORT.get(before, word) for before, word in pairwise(words)]
        ended = CliRunner().invoke(build(), ["steps=4" if word == "steps=100" else word for word in words])
        said = (0, 1, 2) if words[0] == "check" else (0,)  # a check's exit code is its verdict
        assert ended.exit_code in said, f"{line}\n{ended.output}\n{ended.exception!r}"
    for made in MADE[page.stem]:
        assert Path(made).exists(), made


def test_every_page_is_known():
    assert [page.stem for page in PAGES] == sorted(MADE)
