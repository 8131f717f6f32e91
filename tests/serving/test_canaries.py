"""Canaries: a guard that lets known cases pass, or a detector that changed, serves nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from serving_stand_ins import Stage, Watcher, ask, make_service, quick_policy, running, until

from valign.checks import UserError
from valign.guard import Guard
from valign.guard.head.learned import LearnedStage
from valign.guard.rules.lexical import LexicalStage
from valign.serving.audit_store import AuditStore
from valign.serving.canaries import HARMFUL, Canaries, CanaryCheck, drawn_images, policy_prompts, read_canaries
from valign.serving.keys import Keys
from valign.serving.service import Rules
from valign.serving.settings import Settings
from valign.text import WordList
from valign.worlds import world

OFTEN = Settings(names=("tiny",), batch_wait=0.0, steps=4, canary_every=0.05)


def events(folder):
    return [json.loads(link.body) for link in AuditStore(str(folder / "audit.db")).links()]


def test_the_policy_gives_prompts_with_known_answers():
    policy = quick_policy()
    found = policy_prompts(policy, words=LexicalStage.from_policy(policy))
    assert sum(caught for _, caught in found) == len(policy.always_block) + len(policy.categories)
    assert any(not caught for _, caught in found)
    assert CanaryCheck(Guard.from_policy(policy, detector=Watcher())).run() == ""
    assert policy_prompts(policy, words=None) == [one for one in found if not one[1] or one == found[0]]


def test_a_stage_that_finds_too_much_or_a_known_case_that_passes_is_wrong():
    policy = quick_policy()
    assert CanaryCheck(Guard(policy, [Stage(fails=True)])).run().endswith("was caught")
    check = CanaryCheck(Guard(policy, [Stage()]), Canaries(prompts=(("a cat", True),)))
    assert "passed" in check.run()
    assert "a cat" not in check.run()
    lost = Guard.from_policy(policy)
    check = CanaryCheck(lost)
    assert check.run() == ""
    lost.stages[0]._words = WordList(["quagga"])  # as a list that was emptied
    assert check.run().endswith("passed")


def test_the_shipped_head_must_find_what_it_is_known_to_find():
    policy = quick_policy(stages=["learned"])
    guard = Guard.from_policy(policy)
    check = CanaryCheck(guard)
    assert check.run() == ""
    (stage,) = guard.stages
    assert isinstance(stage, LearnedStage)
    assert all(verdict.ranking > 0.5 for verdict in stage.check_many(HARMFUL))
    stage.head = replace(stage.head, weights={**stage.head.weights, "out.weight": stage.head.weights["out.weight"] * 0})
    assert check.run() in ("the head no longer finds what it is known to find", "the head scores otherwise than at the start")


def test_an_image_check_that_passes_or_changed_is_wrong():
    policy, red = quick_policy(), Image.new("RGB", (8, 8), (8, 0, 0))
    assert CanaryCheck(Guard(policy, [Stage()], detector=Watcher([7])), Canaries(images=((red, True),))).run() == ""
    assert (
        "canary image 4 of 4 passed"
        in CanaryCheck(Guard(policy, [Stage()], detector=Watcher()), Canaries(images=((red, True),))).run()
    )
    watcher = Watcher()
    check = CanaryCheck(Guard(policy, [Stage()], detector=watcher))
    assert check.run() == ""
    watcher.detect = lambda images: np.full((len(images), 2), 0.2)
    assert check.run() == "the image check scores otherwise than at the start"
    watcher.detect = lambda images: np.full((len(images), 2), 0.9)
    assert check.run() == "canary image 1 of 3 was caught"
    watcher.fails = True
    del watcher.detect
    assert check.run() == "a check of canaries failed: RuntimeError"


def test_a_worlds_oracle_tells_its_canaries_apart():
    shapes = world("shapes")
    images = shapes.canaries()
    assert [caught for _, caught in images].count(True) == [caught for _, caught in images].count(False) == 4
    guard = Guard(quick_policy(), [Stage()], detector=shapes.oracle())
    assert CanaryCheck(guard, Canaries(images=tuple(images))).run() == ""


def test_a_folder_of_known_cases(tmp_path):
    with pytest.raises(UserError, match=r"must hold canaries: block\.txt, allow\.txt"):
        read_canaries(tmp_path)
    (tmp_path / "block.txt").write_text("a zebra\n\n a quagga \n")
    (tmp_path / "allow").mkdir()
    drawn_images()[0].save(tmp_path / "allow" / "one.png")
    found = read_canaries(tmp_path)
    assert found.prompts == (("a zebra", True), ("a quagga", True))
    assert [caught for _, caught in found.images] == [False]


def test_a_wrong_answer_means_503_until_it_is_right_again(tmp_path):
    watcher = Watcher()
    guard = Guard.from_policy(quick_policy(), detector=watcher)
    with running(make_service(tmp_path, guard=guard, settings=OFTEN)) as url:
        assert ask(f"{url}/v1/moderations", {"input": "a cat"}).status == 200
        watcher.flags = {-1}  # the colour of the gradient's corner
        until(lambda: ask(f"{url}/readyz").status == 503)
        found = ask(f"{url}/v1/moderations", {"input": "a cat"})
        assert (found.status, found.json()["error"]["code"]) == (503, "check_unavailable")
        assert "was caught" in ask(f"{url}/readyz").json()["status"]
        watcher.flags = set()
        until(lambda: ask(f"{url}/readyz").status == 200)
        assert ask(f"{url}/v1/moderations", {"input": "a cat"}).status == 200
    said = [entry["canaries"] for entry in events(tmp_path) if entry["kind"] in ("start", "canaries")]
    assert said == ["right", "canary image 1 of 3 was caught", "right"]


def test_wrong_at_the_start_is_not_served_and_a_reload_keeps_the_old(tmp_path):
    known = Canaries(prompts=(("a cat", True),))
    with running(make_service(tmp_path, canaries=known)) as url:
        assert ask(f"{url}/healthz").status == 200
        assert ask(f"{url}/v1/models").status == 503
    (tmp_path / "second").mkdir()
    guards = [Guard.from_policy(quick_policy()), Guard(quick_policy(), [Stage(fails=True)])]
    service = make_service(tmp_path / "second", load_rules=lambda: Rules(guards.pop(0), Keys()))
    with running(service) as url:
        import asyncio

        assert not asyncio.run_coroutine_threadsafe(service.reload(), service._loading.get_loop()).result(30)
        assert ask(f"{url}/v1/models").status == 200
        assert ask(f"{url}/readyz").json()["reload"] == "failed, see the log"
