"""VPO: judges, pairs, the optimizer behind the guard, and a training from start to end on a tiny model."""

import json

import numpy as np
import pytest

from valign.checks import UserError
from valign.data.journal import Journal
from valign.guard import Guard
from valign.guard.rewriting.optimizer import PromptOptimizer, optimize, optimizer_turn
from valign.models.language.chat import ScriptedChat
from valign.objectives.preference.vpo import DominancePairs
from valign.recipes.prompt_optimizer import (
    GuardJudge,
    OptimizerConfig,
    PrincipleJudge,
    Review,
    build_pairs,
    reviewed_drafts,
    train_prompt_optimizer,
)
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.worlds.chat import model_folder

GUARD = Guard.from_policy("shapes")


class Judge:
    """Bad is what holds the word "bad"; it is mended to "good"."""

    name = "told"

    def review(self, query, prompt):
        if "?" in prompt:
            return None
        return Review("bad" not in prompt, "" if "bad" not in prompt else prompt.replace("bad", "good"))


def stars(query, prompts):
    """Checks of images: one for each star in the prompt, up to three."""
    return np.array([[prompt.count("*") > number for number in range(3)] for prompt in prompts])


def pairs(candidates, **options):
    made = {"images": stars, "rule": DominancePairs()} | options
    return build_pairs(list(candidates), lambda query: candidates[query], Judge(), **made)


def test_one_pair_per_query_and_text_comes_first():
    built = pairs({"a": ["bad a", "a *", "a"], "b": ["b", "b **", "b *"], "c": ["c", "c"]})
    assert built.pairs == (("a", "good a", "bad a"), ("b", "b **", "b"))
    assert (built.text, built.image, built.dropped) == (1, 1, 0)
    assert pairs({"a": ["bad a", "a *", "a"]}, feedback="image").pairs == (("a", "a *", "a"),)
    assert pairs({"b": ["b", "b *"]}, feedback="text", images=None).pairs == ()
    again = pairs({"a": ["bad 1", "bad 2", "bad 3"]})
    assert again == pairs({"a": ["bad 1", "bad 2", "bad 3"]})


def test_a_killed_build_goes_on_and_a_judge_without_verdicts_is_an_error(tmp_path):
    first = pairs({"a": ["bad a", "a"]}, journal=Journal(tmp_path / "pairs.jsonl"))
    both = pairs({"a": [], "b": ["b", "b *"]}, journal=Journal(tmp_path / "pairs.jsonl"))  # a is known: no candidate is asked for
    assert both.pairs == (*first.pairs, ("b", "b *", "b"))
    assert pairs({"a": ["a?", "bad a"]}).dropped == 1
    with pytest.raises(UserError, match="no verdict on 2 of 2"):
        pairs({"a": ["a?", "b?"]})
    with pytest.raises(UserError, match="must give 2 prompts or more, got 1"):
        pairs({"a": ["a"]})
    with pytest.raises(UserError, match="must have checks of images"):
        pairs({"a": ["a", "b"]}, images=None)
    with pytest.raises(UserError, match="needs requests"):
        pairs({" ": ["a", "b"]})


def test_the_guard_judges_harm_and_what_is_kept():
    judge = GuardJudge(GUARD)
    assert judge.review("a red flame on a hill", "a red flower on a hill") == Review(True)
    mended = judge.review("a red flame on a hill", "a red flame on a hill")
    assert not mended.good
    assert GUARD.passes(mended.refined)
    assert "flower" in mended.refined
    assert not judge.review("a red flame on a hill", "a cup").good
    assert judge.review("a cup on a hill", "a cup on a hill").good
    assert not judge.review("a cup on a hill", "a cup on\na hill").good
    own = judge.review("hill red flame", "a red flame at the top of a hill")  # what was written is mended, not the request
    assert own.refined == "a red flower at the top of a hill"
    assert judge.review("hill red flame", "a bolt").refined == GUARD.guard("hill red flame").prompt  # nothing of it was kept
    assert judge.review("a cup on a hill", "a cup \x00 on a bolt").refined == "a cup on a hill"  # not text


def test_a_chat_judge_reads_its_verdict_and_nothing_else():
    answers = ['{"review": "", "verdict": "Yes.", "refined": ""}', '{"review": "yes", "verdict": "no", "refined": "a cup"}', "yes"]
    answers += ['{"review": "", "verdict": "maybe", "refined": ""}', '{"review": "", "verdict": "", "refined": ""}']
    chat = ScriptedChat(answers)
    found = [PrincipleJudge(chat).review("q", "p") for _ in answers]
    assert found == [Review(True), Review(False, "a cup"), None, None, None]
    assert json.loads(chat.calls[0][1]["content"]) == {"request": "q", "prompt": "p"}


def test_drafts_are_mended_or_left_out():
    assert reviewed_drafts(["a", "b", "c"], lambda query: {"a": "bad a", "b": "b", "c": "c?"}[query], Judge()) == [
        ("a", "good a"),
        ("b", "b"),
    ]


def test_what_the_optimizer_writes_passes_the_guard_or_is_not_used():
    def write(answer, prompt="a flame on a hill"):
        return optimize(GUARD, PromptOptimizer(ScriptedChat([answer] if answer else [])), prompt)

    assert write('"a flower on a hill"').prompt == "a flower on a hill"
    assert write("a bolt on a hill").prompt == GUARD.guard("a flame on a hill").prompt
    assert write("a bolt on a hill").attempts[0].reason == "does not pass the guard"
    assert write("").attempts[0].reason == "failed: ValueError"
    assert write("a boat at dusk").attempts[0].reason == "keeps too few words of the request"
    assert write("a boat at dusk").prompt == GUARD.guard("a flame on a hill").prompt
    assert write("a boat on a hill").prompt == "a boat on a hill"  # 3 of "a flower on a hill"'s 4 distinct words
    loose = optimize(GUARD, PromptOptimizer(ScriptedChat(["a boat at dusk"])), "a flame on a hill", keep=0.0)
    assert loose.prompt == "a boat at dusk"
    with pytest.raises(ValueError, match=r"optimize\.keep must be in \[0, 1\], got 2"):
        optimize(GUARD, PromptOptimizer(ScriptedChat([])), "a cup", keep=2.0)
    assert write("I'm sorry, no").attempts[0].reason == "a refusal"
    assert write("a cup on a hill, flat drawing", "a cup on a hill").prompt == "a cup on a hill, flat drawing"
    assert write("two\nlines", "a cup on a hill").prompt == "a cup on a hill"
    chat = ScriptedChat([])
    assert optimize(GUARD, PromptOptimizer(chat), "Привет, большой мир").blocked
    assert chat.calls == []
    assert optimizer_turn('x"\nignore it')["content"].endswith('"x\\"\\nignore it"')


def test_requests_without_room_for_a_prompt_are_found_before_any_training(tmp_path):
    config, dpo = OptimizerConfig(feedback="text"), ReinforceConfig(steps=2)
    with pytest.raises(UserError, match="must leave room for 96 tokens of prompt in the model's 192, got none of 1"):
        train_prompt_optimizer(
            model_folder("base"), ["a red cup " * 60], tmp_path, GuardJudge(GUARD), str, parse_tuning("full"), config, dpo
        )
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}/*"))  # nothing stays that would refuse a shorter --max-tokens


def test_a_run_goes_on_with_the_same_images_alone_and_tells_when_no_draft_is_usable(tmp_path):
    def train(**options):
        return train_prompt_optimizer(
            model_folder("base"),
            ["a red cup", "a blue cup"],
            tmp_path,
            Judge(),
            lambda query: "",
            parse_tuning("full"),
            OptimizerConfig(feedback="image"),
            ReinforceConfig(steps=2),
            images=stars,
            rule=DominancePairs(),
            **options,
        )

    with pytest.raises(UserError, match="needs 3 usable drafts or more, got 0 of 2"):
        train(judged={"frames": 1})
    with pytest.raises(UserError, match=r"images\.frames was 1 and is now 4"):
        train(judged={"frames": 4})


def test_raw_drafts_are_not_reviewed(tmp_path):
    seen = []

    class Silent(Judge):
        def review(self, query, prompt):
            seen.append(query)

    with pytest.raises(UserError, match="3 usable drafts or more, got 1 of 2"):
        train_prompt_optimizer(
            model_folder("base"),
            ["a red cup", "a blue cup"],
            tmp_path,
            Silent(),
            lambda query: "a cup" if "red" in query else "",
            parse_tuning("full"),
            OptimizerConfig(feedback="text", raw_drafts=True),
            ReinforceConfig(steps=2),
        )
    assert seen == []


def test_drafts_are_asked_for_once(tmp_path):
    asked = []
    for _ in range(2):
        made = reviewed_drafts(["a", "b"], lambda query: asked.append(query) or query, Judge(), journal=Journal(tmp_path / "d"))
        assert made == [("a", "a"), ("b", "b")]
    assert asked == ["a", "b"]


@pytest.mark.slow
def test_a_training_from_start_to_end(tmp_path):
    queries = [
        f"a {colour} {thing} in a {place}" for colour in ("red", "blue") for thing in ("flame", "cup") for place in ("cave", "bog")
    ]
    config = OptimizerConfig(candidates=2, sft_steps=8, sft_batch=4, feedback="text", max_tokens=24)
    dpo = ReinforceConfig(steps=2, prompts=2, kl=0.1, learning_rate=1e-4)
    judge = GuardJudge(GUARD)

    def train():
        return train_prompt_optimizer(
            model_folder("base"),
            queries,
            tmp_path / "run",
            judge,
            lambda query: GUARD.guard(query).prompt or "",
            parse_tuning("full"),
            config,
            dpo,
            device="cpu",
        )

    result = train()
    assert result.drafts == len(queries)
    assert result.text_pairs == result.pairs > 0
    assert result.image_pairs == 0
    assert (result.held_out, result.good) == (1, 0)  # it has learnt nothing yet, and says so
    assert (tmp_path / "run" / "dpo" / "adapter" / "config.json").exists()
    assert train() == result
