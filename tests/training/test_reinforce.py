"""Every method from start to end on a chat model in miniature; what each refuses."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reinforce_data import PROMPTS, first_letter, full, tiny_chat, tiny_config

from valign.data.chats import Conversation
from valign.data.chats.dual_preferences import DualPreference
from valign.models.language.scalar import load_scalar, new_scalar
from valign.objectives.rewards.safe_rlhf import Multiplier
from valign.training.engine.processes import start_processes
from valign.training.tasks.reinforce.dr_irl import DrIrlMethod, balanced
from valign.training.tasks.reinforce.ppo_task import PPOConfig, PPOTask
from valign.training.tasks.reinforce.run import MethodOptions, RewardSources, reinforce
from valign.training.tasks.reinforce.scalar_task import ScalarConfig, cost_pairs, fit_scalar, reward_pairs
from valign.training.tasks.reinforce.shadow import ShadowConfig, draft_demonstration, drafted_into

PAIRS = [
    DualPreference((("user", f"say {word}"),), (word, "I cannot."), 0, 1, (-2.0, 1.0)) for word in ("ash", "cat", "elk", "fox")
]  # the word is more helpful, and harmful
OPTIONS = MethodOptions(
    template="Q: {query}",
    shadow=ShadowConfig(rounds=2, policy_steps=1),
    scalar=ScalarConfig(scalar_steps=4, scalar_batch=2, scalar_learning_rate=1e-2),
    multiplier=Multiplier(start=1.0, limit=0.0),
    ppo=PPOConfig(critic_learning_rate=1e-3),
)


def letters(texts):
    """An encoder for tests: how often each letter stands in a text."""
    return torch.tensor([[1.0 + text.count(chr(97 + place)) for place in range(26)] for text in texts])


def harm(prompts, outputs):
    return torch.tensor([1.0 if len(output) % 2 else -1.0 for output in outputs])


SOURCES = {
    "alphaalign": RewardSources(reward=first_letter),
    "dr-irl": RewardSources(reward=first_letter, encoder=letters),
    "safe-rlhf": RewardSources(preferences=PAIRS, ptx=[Conversation((("user", "hi"), ("assistant", "yo")))]),
    "grpo-lagrangian": RewardSources(reward=first_letter, cost=harm),
    "grpo": RewardSources(reward=first_letter),
}


def run(out, method, sources=None, prompts=PROMPTS, options=OPTIONS, **changes):
    loaded = replace(tiny_chat(), folder=out.parent / "tiny")  # the adapter's record is of this folder
    loaded.model.save_pretrained(loaded.folder)
    return reinforce(loaded, prompts, out, method, full(), tiny_config(**changes), options, sources or SOURCES[method])


def digest(folder):
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("method", list(SOURCES))
def test_a_method_runs_to_its_end_and_a_finished_run_is_returned(method, tmp_path):
    result = run(tmp_path / "a", method)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert run(tmp_path / "a", method) == result
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(result.adapter)
    start = tiny_chat().model.state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in trained.state_dict().items())
    if method in ("safe-rlhf", "grpo-lagrangian"):
        assert lines[0]["multiplier"] == 1.0  # before the delay
        moved = 1.0 * torch.tensor(0.1 * lines[1]["mean_cost"]).exp().item()
        assert lines[1]["multiplier"] == pytest.approx(moved, rel=1e-5)
    if method == "safe-rlhf":
        assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert set(result.learnt) == {"reward", "cost"}


def test_ppo_resumes_to_the_same_bytes(tmp_path):
    whole = run(tmp_path / "a", "safe-rlhf")
    (tmp_path / "b").mkdir()
    import shutil

    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "b" / "adapter")
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    (tmp_path / "b" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    kept = tmp_path / "b" / "checkpoints"
    one = run(tmp_path / "c", "safe-rlhf", steps=1)  # the state after the first step
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "c" / "checkpoints", kept)
    assert one.steps == 1
    again = run(tmp_path / "b", "safe-rlhf")
    assert digest(again.adapter) == digest(whole.adapter)


def test_ppo_at_its_first_step_loses_the_mean_joint_advantage(tmp_path):
    loaded = tiny_chat()
    critics = (new_scalar(loaded, seed=0), new_scalar(loaded, seed=1))
    task = PPOTask(
        loaded,
        PROMPTS,
        first_letter,
        harm,
        critics,
        Multiplier(start=2.0),
        full(),
        tiny_config(),
        PPOConfig(),
        start_processes(cpu=True),
    )
    record = task.gradients(0)
    found = task.episodes
    mean = ((found.joint * found.mask).sum(1) / found.mask.sum(1)).mean()
    assert record["loss"] == pytest.approx(-float(mean), rel=1e-4)
    assert all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in part) for part in task.parts)


def test_reward_and_cost_models_rank_what_they_are_shown():
    loaded, accelerator = tiny_chat(), start_processes(cpu=True)
    config = ScalarConfig(scalar_steps=30, scalar_batch=4, scalar_learning_rate=1e-2)
    for pairs, loss in (reward_pairs(PAIRS), cost_pairs(PAIRS, config)):
        scalar = new_scalar(loaded, seed=0)
        assert fit_scalar(scalar, pairs, loss, config, accelerator, out=None, seed=0, label="t") == 1.0
    high, low = (scalar.scored([pair[side] for pair in pairs]) for side in (0, 1))
    assert (high > 0).all()  # the cost's boundary
    assert (low < 0).all()


def test_a_scalar_model_is_saved_and_loaded_and_one_without_a_head_is_refused(tmp_path):
    loaded = tiny_chat()
    scalar = new_scalar(loaded, seed=3)
    scalar.save(tmp_path / "s")
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "cdef")]
    again = load_scalar(tmp_path / "s", loaded, what="--cost")
    assert torch.allclose(again.scored(chats), scalar.scored(chats))
    assert torch.allclose(scalar.scored(chats[:1]), scalar.scored(chats)[:1])  # padding changes nothing
    loaded.model.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"--cost must be a model with a scalar head .* got LlamaForCausalLM with no head"):
        load_scalar(tmp_path / "words", loaded, what="--cost")
    with pytest.raises(ValueError, match=r"--reward must be a folder with config\.json"):
        load_scalar(tmp_path / "none", loaded, what="--reward")


def test_difficulty_scales_advantages_and_never_rewards():
    shadow = {"hate": first_letter, "violence": first_letter}
    plain, scaled = (DrIrlMethod(shadow, first_letter, letters, scaled=on) for on in (False, True))
    said = {
        prompt.query: text for prompt, text in zip(PROMPTS, ("zzz qqq", "x", "I cannot say cat.", "x", "I cannot say elk.", "kk"))
    }
    for method in (plain, scaled):
        method.before_step(0, PROMPTS, 3, lambda prompts: [said[prompt.query] for prompt in prompts])
    assert plain.alpha.tolist() == [1.0] * 6
    assert scaled.alpha[[1, 3]].tolist() == [1.0, 1.0]  # without a demonstration
    assert scaled.alpha[0] > scaled.alpha[4]  # far from its demonstration, and at it
    advantages, places = torch.tensor([1.0, -1.0]), [0, 4]
    assert torch.equal(scaled.advantages(advantages, torch.zeros(2, 1), places, 2), advantages * scaled.alpha[places])
    assert torch.equal(plain.advantages(advantages, torch.zeros(2, 1), places, 2), advantages)
    before = scaled.alpha.clone()
    scaled.before_step(1, PROMPTS, 3, lambda prompts: ["other"] * len(prompts))  # within an epoch nothing changes
    assert torch.equal(scaled.alpha, before)


def test_demonstrations_are_balanced_and_drafted_once(tmp_path):
    found = balanced([*PROMPTS, replace(PROMPTS[0], turns=(("user", "say ant"),))])
    assert {name: len(rows) for name, rows in found.items()} == {"hate": 2, "violence": 2}
    assert draft_demonstration(PROMPTS[0], lambda text: "- no\n####\nI will not.") == "I will not."
    assert draft_demonstration(PROMPTS[0], lambda text: "no line") is None
    bare = [replace(prompt, demonstration=None) for prompt in PROMPTS]
    asked = []

    def write(text):
        asked.append(text)
        return "####" if "say cat" in text else "- short\n####\nI must decline."

    first = drafted_into(tmp_path / "d.json", bare, write)
    assert len(asked) == 4  # the harmful ones
    assert len(first) == 5  # the one without a demonstration is left out
    assert drafted_into(tmp_path / "d.json", bare, write) == first
    assert len(asked) == 4
    with pytest.raises(ValueError, match="must write demonstrations, got none of 6"):
        drafted_into(tmp_path / "e.json", bare, lambda text: "")


def test_what_a_method_lacks_is_refused_before_any_work(tmp_path):
    for method, sources, message in (
        ("grpo", RewardSources(), "--method grpo must have a reward to follow, got none"),
        ("safe-rlhf", RewardSources(reward=first_letter), "--method safe-rlhf must have --cost, or --preferences"),
        ("dr-irl", RewardSources(), "must have an encoder"),
        ("nonsense", RewardSources(), "--method must be one of alphaalign"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "x", method, sources)
    with pytest.raises(ValueError, match="Row 2 must have a category and a demonstration, or --reward must score it"):
        run(tmp_path / "x", "dr-irl", RewardSources(encoder=letters))
    lonely = [*PROMPTS, replace(PROMPTS[0], category="theft")]
    with pytest.raises(ValueError, match="at least 2 demonstrations in each category, got 1 of theft"):
        run(tmp_path / "y", "dr-irl", prompts=lonely)
    with pytest.raises(ValueError, match="--method grpo-lagrangian must have --reward, or --preferences"):
        run(tmp_path / "z", "grpo-lagrangian", RewardSources(cost=harm))


def test_a_training_that_changes_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="The policy must differ after 2 steps of grpo, got the same weights"):
        run(tmp_path / "a", "grpo", RewardSources(reward=lambda prompts, outputs: torch.zeros(len(outputs))), kl=0.0)
