"""The guard's encoder in fine-tuning: the guard's own answers before it, held answers, and the guard that is left."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from valign.checks import UserError
from valign.data.tasks.base import TaskData
from valign.data.tasks.texts import TextRow, TextTask
from valign.guard.head.learned import SHIPPED
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.guard_text import PromptRow, load_guard_text_model
from valign.models.heads.prompt_head import load_head
from valign.models.heads.task_model import Target
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preserving import PreserveData, parse_preserving
from valign.training.tasks.supervised import SupervisedConfig, finetune

PROMPTS = ("a red boat on a lake", "a man beats another man bloody", "two dogs, oil painting")
ROWS = tuple(PromptRow(prompt, (number % 2,) * 8) for number, prompt in enumerate(PROMPTS))
TASK = TextTask(name="mood", kind="classification", texts=("text",), target="mood")
TEXTS = tuple(
    TextRow((f"{word} film",), mood) for word, mood in (("a fine", "+"), ("a dull", "-"), ("what a", "+"), ("a bad", "-"))
)
DATA = TaskData(TASK, TEXTS, TEXTS[:2])


@pytest.fixture(scope="module")
def head():
    return load_head(SHIPPED)


@pytest.fixture
def model(head):
    return load_guard_text_model(head, Target.of(DATA), seed=0)


def train(model, out, preserve, rate=3e-2, adapter="lora"):
    config = SupervisedConfig(steps=8, batch_size=4, validate_every=0, checkpoint_every=0)
    objectives, _ = parse_preserving(*preserve)
    beside = PreserveData(calibration=ROWS) if objectives else None
    finetune(model, DATA, out, parse_tuning(adapter, {"learning_rate": rate}), config, preserve=objectives or None, beside=beside)
    trained, encoder = model.trained_guard()
    return trained.score(encoder, PROMPTS, quick=False)


def test_it_says_of_prompts_what_the_guard_says(head, model):
    batch = model.eval().batch(ROWS)
    with torch.no_grad():
        answer, loss = model(batch), model.loss(batch) / batch.weight
    expected = torch.from_numpy(head.score(MiniLM(), PROMPTS, quick=False))
    torch.testing.assert_close(answer[:, :-1].softmax(2)[..., 1], expected, rtol=1e-3, atol=1e-5)
    said = torch.tensor([row.answers for row in ROWS]).float()
    logits = answer[:, :-1, 1] - answer[:, :-1, 0]
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits, said), rtol=1e-5, atol=1e-6)


def test_untouched_it_is_the_guard_as_it_was(head, model):
    trained, encoder = model.trained_guard()
    np.testing.assert_array_equal(trained.score(encoder, PROMPTS), head.score(MiniLM(), PROMPTS))


@pytest.mark.parametrize("preserve", [("kl", {"weight": 10.0}), ("agl", {"lambda_A": 10.0, "lambda_T": 10.0})])
def test_what_preserves_holds_the_guards_answers(head, preserve, tmp_path):
    before = head.score(MiniLM(), PROMPTS, quick=False)
    moved = {}
    for name, chosen in (("plain", ("",)), ("held", preserve)):
        fresh = load_guard_text_model(head, Target.of(DATA), seed=0)
        moved[name] = np.abs(train(fresh, tmp_path / name, chosen) - before).max()
    assert moved["held"] < moved["plain"] / 10


def test_full_fine_tuning_leaves_its_embeddings_in_the_guard(head, model, tmp_path):
    before = head.score(MiniLM(), PROMPTS, quick=False)
    assert np.abs(train(model, tmp_path, ("",), rate=1e-3, adapter="full") - before).max() > 1e-3
    _, encoder = model.trained_guard()
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(encoder.weights[name], MiniLM().weights[name])


def test_objectives_on_the_training_texts_need_words_still(model, tmp_path):
    with pytest.raises(UserError, match="--preserve constrained-sft must go with a language model, got classification"):
        train(model, tmp_path, ("constrained-sft",))
