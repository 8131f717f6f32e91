"""The examples of docs/how-to/data.md are files that valign reads."""

import re
from pathlib import Path

import pytest
from PIL import Image

from valign.data.chats import read_chat_pairs, read_chats
from valign.data.chats.dual_preferences import read_dual_preferences
from valign.data.chats.reward_prompts import read_reward_prompts
from valign.data.images.quadruples import read_quadruples
from valign.data.prompts.layouts import LAYOUTS
from valign.data.prompts.readers import read_pairs, read_prompts
from valign.data.tasks.image_folders import list_images
from valign.data.tasks.texts import TextTask, read_rows
from valign.evaluation.chats.judges import read_labelled_answers
from valign.evaluation.chats.red_eval import read_questions
from valign.evaluation.images.made_elsewhere import read_made_elsewhere
from valign.evaluation.suite_files import read_suite
from valign.policy import CATEGORY_IDS

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r'```text title="([^"]+)"\n(.*?)```', PAGE, flags=re.DOTALL))
CLASSES = TextTask(name="classification", kind="classification", texts=("text",), target="label")


def beside_images(read):
    """What reads the folder of a table that names two images."""

    def reader(path):
        for name in ("lamp.png", "boat.png"):
            Image.new("RGB", (8, 8)).save(path.parent / name)
        return read(path.parent)

    return reader


READERS = {  # example -> what reads it, and how many it holds
    "pairs.csv": (read_pairs, 3),
    "prompts.jsonl": (read_prompts, 3),
    "benign.tsv": (read_prompts, 3),
    "suite.jsonl": (lambda path: read_suite(path).prompts, 3),
    "metadata.csv": (beside_images(lambda folder: list_images(folder, "file_name", "text")), 2),
    "chats.jsonl": (read_chats, 2),
    "alpaca.json": (read_chats, 2),
    "reviews.csv": (lambda path: read_rows(path, CLASSES), 2),
    "preferences.jsonl": (read_chat_pairs, 2),
    "dual.jsonl": (read_dual_preferences, 1),
    "requests.jsonl": (read_reward_prompts, 2),
    "questions.csv": (read_questions, 1),
    "labelled.csv": (read_labelled_answers, 2),
    "manifest.csv": (beside_images(lambda folder: read_made_elsewhere(folder, known=CATEGORY_IDS).suite.prompts), 2),
    "quadruples.csv": (beside_images(lambda folder: read_quadruples(folder, known=CATEGORY_IDS).rows), 2),
}


@pytest.mark.parametrize("name", READERS)
def test_an_example_is_read(tmp_path, name):
    (tmp_path / name).write_text(EXAMPLES[name], encoding="utf-8")
    read, count = READERS[name]
    assert len(read(tmp_path / name)) == count


def test_every_example_has_its_reader():
    assert set(EXAMPLES) == set(READERS)


def test_every_layout_is_named_on_the_page():
    assert [name for name in LAYOUTS if f"`{name}`" not in PAGE and name not in UNNAMED] == []


UNNAMED = {"nibbler-attempted", "diffusiondb-part", "pku-saferlhf", "beavertails", "hh-rlhf"}  # told in words
