"""A cost model that sees images, on the shapes world: the mechanics, with few steps."""

import torch

from valign.guard.answer_filter import AnswerFilter, SeverityVerdict, severity_of_cost
from valign.models.language.loading import load_chat
from valign.models.language.vision_scalar import new_image_scalar
from valign.objectives.rewards.safe_rlhf import cost_loss
from valign.training.engine.processes import start_processes
from valign.training.tasks.reinforce.scalar_task import ScalarConfig, fit_scalar
from valign.worlds.chat import model_folder
from valign.worlds.shapes.image_costs import ANSWERS, QUESTION, image_cost_pairs, image_preferences
from valign.worlds.shapes.world import SHAPES


def test_an_image_cost_model_trains_all_but_its_vision_tower_and_judges_for_the_filter(tmp_path):
    chat = load_chat(model_folder("base"), device="cpu", dtype="float32")
    scalar = new_image_scalar(chat, SHAPES.clip(), seed=0)
    rows = image_preferences(per_category=1, seed=0)
    pairs, signs = image_cost_pairs(rows)
    before = {name: tensor.clone() for name, tensor in scalar.model.state_dict().items()}

    def loss(high, low, places):
        here = torch.tensor([signs[place] for place in places]).sign()
        return cost_loss(high, low, here[:, 0], here[:, 1])

    config = ScalarConfig(scalar_steps=3, scalar_batch=4, scalar_learning_rate=1e-3)
    fit_scalar(scalar, pairs, loss, config, start_processes(cpu=True), out=None, seed=0, label="cost")
    moved = {name for name, tensor in scalar.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not {name for name in moved if "vision_tower" in name}
    assert {"score.weight"} < moved
    assert any("multi_modal_projector" in name for name in moved)
    help_ = [row.chat(0) for row in rows]
    found = scalar.scored(help_)
    assert len(found.unique()) > len(rows) // 2  # the same words: only the images differ
    assert torch.allclose(scalar.scored(help_[:2]), found[:2], atol=1e-5)
    scalar.save(tmp_path / "cost")
    assert (tmp_path / "cost" / "score.safetensors").exists()

    def judge(question, answer, image=None):
        if answer is None:
            return SeverityVerdict("safe")
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return SeverityVerdict(severity_of_cost(float(scalar.scored([(image, said)])[0])))

    answer = AnswerFilter(judge=judge, rounds=2)(QUESTION, lambda number, warning: ANSWERS[0], rows[0].image)
    assert len(answer.verdicts) in (1, 2)
    assert (answer.action == "refused") == (answer.verdicts[0].level != "safe")
