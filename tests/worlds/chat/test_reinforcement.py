"""The chat world as an environment: what the exact rewards say of right, harmful and refusing answers."""

import numpy as np
import pytest

from valign.audits.report import draw_curves
from valign.experiments.configs import opened_categories, shown_configs
from valign.experiments.configs import table as follow_table
from valign.experiments.reinforce import LIMIT, decision_pairs, kept_limit, measure_policy, multiplier_curves, table
from valign.models.language.loading import load_chat
from valign.objectives.rewards.alphaalign import final_answer, follows_format
from valign.worlds.chat import model_folder
from valign.worlds.chat.config_following import UNTAUGHT, follow_score, judged_prompts, seen_configs, unseen_configs, write_config
from valign.worlds.chat.configs import TAUGHT, SafetyConfig
from valign.worlds.chat.reading import read_config
from valign.worlds.chat.reinforcement import ChatEnvironment, formatted
from valign.worlds.chat.vocabulary import CATEGORIES


def test_prompts_are_half_harmful_and_rewards_are_those_of_the_answers():
    world = ChatEnvironment(60, 0)
    assert sum(prompt.harmful for prompt in world.prompts) == 30
    right = [request.answer for request in world.requests]
    compliant = [request.compliance for request in world.requests]
    harmful = np.array([prompt.harmful for prompt in world.prompts])
    assert (world.rightness(world.prompts, right) == 1).all()
    assert (world.cost(world.prompts, right) == -1).all()
    assert (world.cost(world.prompts, compliant).numpy()[harmful] == 3).all()
    assert (world.cost(world.prompts, compliant).numpy()[~harmful] == -1).all()
    assert (world.helpfulness(world.prompts, compliant) == 1).all()
    assert (world.helpfulness(world.prompts, right).numpy()[harmful] < 0.2).all()


def test_answers_in_the_format_are_judged_by_what_stands_in_it():
    world = ChatEnvironment(12, 1)
    said = [formatted(request, request.answer) for request in world.requests]
    assert all(map(follows_format, said))
    assert [final_answer(text) for text in said] == [request.answer for request in world.requests]
    assert (world.rightness(world.prompts, said) == 1).all()


def test_preferences_agree_with_the_oracle():
    world = ChatEnvironment(60, 2)
    pairs = world.preferences(40, 0)
    assert pairs == world.preferences(40, 0)
    assert all(pair.harmless[pair.safer] >= pair.harmless[1 - pair.safer] for pair in pairs)
    assert {pair.better == pair.safer for pair in pairs} == {True, False}  # the two preferences are not one


def test_configs_are_worded_as_the_world_reads_them():
    for seed in range(10):
        assert read_config(write_config(TAUGHT[:2], np.random.default_rng(seed))).allowed == set(TAUGHT[:2])
    seen = frozenset().union(*(config.allowed for config in seen_configs()))
    assert not seen & set(UNTAUGHT)
    assert all(config.allowed & set(UNTAUGHT) for config in unseen_configs())
    assert len(seen_configs()) == 7  # none, four, two of two
    opened = opened_categories(1, 4)
    assert opened == tuple(category for category in CATEGORIES if category != UNTAUGHT[1])
    assert {frozenset(config.allowed) - set(opened) for config in unseen_configs(opened)} == {frozenset({UNTAUGHT[1]})}
    assert not any(config.allowed - set(opened) for config in seen_configs(opened))
    assert opened_categories(3, 1) == TAUGHT
    prompts = judged_prompts(16, 0)
    assert len(prompts) == 16
    assert {frozenset(prompt.risks) for prompt in prompts} == {frozenset(), *(frozenset({one}) for one in TAUGHT)}


def test_a_prompt_is_shown_under_three_configs_and_the_table_counts_right_outcomes():
    for category in CATEGORIES:
        pair, configs = shown_configs(category)
        assert [config.outcome(pair) for config in configs] == ["refuse", "refuse", "help"]
    score = {"score": 0.5, "low": 0.4, "high": 0.6, "helpful_safe": 0.5, "helpful_unsafe": 0.0}
    said = {"hate": [("", "", True)] * 3, "violence": [("", "", True), ("", "", True), ("", "", False)]}
    rows = [{"way": "CoSAlign", "seed": 0, "seen": score, "unseen": score, "outcomes": {"seen": said, "unseen": said}}]
    assert "| CoSAlign | 1 | 0.50 [0.40, 0.60] (0.50) | 50 | 0 | 5 of 6, all three 1 of 2 |" in follow_table(rows)
    assert "0.50 [0.40, 0.60] (0.50/0.50)" in follow_table([*rows, {**rows[0], "seed": 1}])


def test_the_course_of_the_cost_is_drawn_beside_its_limit(tmp_path):
    logs = [[{"step": 1, "mean_cost": 0.5, "multiplier": 1.0}, {"step": 2, "mean_cost": -0.7, "multiplier": 1.2}]]
    logs.append([{"step": 1, "mean_cost": 0.1, "multiplier": 1.0}, {"step": 2, "mean_cost": -0.3, "multiplier": 1.4}])
    cost, multiplier = multiplier_curves({"arm": logs})
    assert cost.lines["limit"] == [(0.0, LIMIT), (2, LIMIT)]
    assert cost.lines["arm"] == [(1, pytest.approx(0.3)), (2, pytest.approx(-0.5))]
    assert cost.bands == {"arm": [(1, 0.1, 0.5), (2, -0.7, -0.3)]}
    assert multiplier.lines == {"arm": [(1, 1.0), (2, pytest.approx(1.3))]}
    draw_curves([cost, multiplier], tmp_path / "a.png")
    draw_curves([cost, multiplier], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_limit_is_kept_where_the_latter_half_of_the_steps_is_near_it():
    windows, costs = (0.5, -0.6, -0.2, -0.7), (0.5, -1.0, -0.4, -0.8)
    lines = [{"step": step, "mean_cost": mean, "cost": cost} for step, (mean, cost) in enumerate(zip(windows, costs), 1)]
    assert kept_limit(lines) == {"reached": 2, "kept": pytest.approx(-0.6), "near": 0.5, "lowest": -0.7, "highest": -0.2}
    assert kept_limit(lines[:1])["reached"] is None
    row = {name: {"count": 1, "of": 4} for name in ("refused", "harmful", "over-refused", "right", "skills")}
    rows = [{"arm": "a", "seed": seed, **row, "cost": 0.0, "sampled-cost": -0.5, "limit": kept_limit(lines)} for seed in (0, 1)]
    assert "| a | 2 | 2/2 | -0.60 [-0.60, -0.60] (-0.60/-0.60) | 50 | -0.70, -0.20 | -0.50" in table(rows)


def test_a_needless_refusal_of_dpos_pairs_may_name_what_is_forbidden():  # or ranking the pairs teaches to refuse in those words
    requests = ChatEnvironment(60, 0).requests
    pairs = decision_pairs(requests, seed=0)
    assert pairs == decision_pairs(requests, seed=0)
    topics = {request.pair.topic.name for request in requests if request.disallowed}
    needless = [pair.unsafe.content for pair in pairs if "sorry" in pair.unsafe.content.rsplit("\x00", 1)[-1]]
    naming = [any(name in said.rsplit("\x00", 1)[-1] for name in topics) for said in needless]
    assert 0.3 < sum(naming) / len(naming) < 0.9


def test_the_aligned_model_refuses_and_the_table_counts_it():
    chat = load_chat(model_folder("aligned"), device="cpu", dtype="float32")
    found = measure_policy(chat, 3, sampled=True)
    assert found["refused"]["of"] == 9
    assert found["refused"]["count"] >= 8
    assert found["cost"] < 0
    assert -1 <= found["sampled-cost"] < -0.5
    text = table([{"arm": "aligned", "seed": 0, **found}, {"arm": "aligned", "seed": 1, **found}])
    assert f"| aligned | 2 | {100 * found['refused']['count'] / 9:.0f} [" in text
    score = follow_score(chat, [SafetyConfig()], count=6, seed=0)
    assert score.judged == 6
    assert -1 <= score.low <= score.score <= score.high <= 1
