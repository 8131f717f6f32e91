"""The search for the smallest realignment that passes; and one real repair."""

import pytest

from valign.checks import UserError
from valign.policy import load_policy
from valign.recipes.repair import LADDERS, RepairAttempt, best_attempt, repair, search


class Attempts:
    """Passes from a strength on, by method; the change is ``scale * strength``."""

    def __init__(self, passes, scale=1.0):
        self.passes, self.scale, self.asked = passes, scale, []

    def __call__(self, method, strength):
        self.asked.append((method, strength))
        verdict = "safe" if strength >= self.passes.get(method, 9) else "drifted"
        return RepairAttempt(method=method, strength=strength, moved=self.scale * strength, verdict=verdict, reason="")


def test_each_method_stops_at_its_first_pass_and_is_refined():
    attempts = Attempts({"a": 0.4})
    found = search({"a": (1.0, 0.25, 0.5)}, attempts, refine=2)
    assert attempts.asked == [("a", 0.25), ("a", 0.5), ("a", 0.375), ("a", 0.4375)]
    assert best_attempt(found).strength == 0.4375  # the smallest that passed


def test_the_smallest_change_of_all_methods_is_taken():
    found = search({"a": (0.5, 1.0), "b": (0.2, 0.4)}, Attempts({"a": 0.5, "b": 0.3}), refine=0)
    assert best_attempt(found).name == "b-0.4"


def test_a_method_is_given_up_beyond_the_smallest_that_passed():
    attempts = Attempts({"a": 0.1})
    search({"a": (0.1,), "b": (0.5, 0.7, 0.9)}, attempts, refine=0)
    assert attempts.asked == [("a", 0.1), ("b", 0.5)]


def test_where_nothing_passes_there_is_no_best():
    attempts = Attempts({})
    found = search(LADDERS, attempts)
    assert best_attempt(found) is None
    assert len(found) == sum(map(len, LADDERS.values()))


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be of resta, enchtable, safe-lora, got somf"):
        repair("chat", "chat:base", load_policy("chat"), tmp_path, base="chat:base", methods=["somf"])


@pytest.mark.slow
def test_the_chat_worlds_base_is_repaired_by_its_safety_vector(tmp_path):
    """base + 1 (aligned - base) is the aligned model itself, so RESTA at 1 must pass, and 0 must not."""
    from shutil import copytree

    from valign.evaluation.checking.decision import DriftLimits
    from valign.recipes.check import CheckOptions
    from valign.worlds.chat import model_folder

    drifted = copytree(model_folder("base"), tmp_path / "drifted")
    found = repair(
        "chat",
        str(drifted),
        load_policy("chat"),
        tmp_path / "out",
        base="chat:base",
        methods=["resta"],
        refine=0,
        limits=DriftLimits(max_drift=0.1),
        options=CheckOptions(samples=15, max_tokens=40),
        device="cpu",
    )
    assert found["outcome"] == "repaired"
    assert found["start"]["verdict"] == "drifted"
    assert (tmp_path / "out" / "repaired" / "config.json").exists()
    assert (tmp_path / "out" / "report.html").exists()
    assert not list((tmp_path / "out" / "attempts").rglob("*.safetensors"))
