"""Systems made of systems: the guard before one, several runs as one."""

from contextlib import contextmanager

import numpy as np
import pytest

from squares import make_suite
from valign.checks import UserError
from valign.evaluation.composed import guarded_system, suite_of_runs, system_of_runs
from valign.evaluation.suite import prompt_seed
from valign.evaluation.systems import System
from valign.guard import Guard
from valign.interfaces import DetectorCard
from valign.policy import load_policy

SHAPES = load_policy("shapes")


def echo(name="echo", calls=None):
    """Its "images" are what it was asked."""

    def generate(prompts, seeds):
        if calls is not None:
            calls.append(list(prompts))
        return [(name, prompt, seed) for prompt, seed in zip(prompts, seeds)]

    return System(name, generate, fingerprint=name)


def test_the_guard_rewrites_blocks_and_leaves_alone_in_one_batch():
    calls = []
    blocking = SHAPES.model_copy(
        update={"categories": [c.model_copy(update={"action": "block"}) if c.id == "hate" else c for c in SHAPES.categories]}
    )
    system = guarded_system(echo(calls=calls), Guard.from_policy(blocking), name="guard")
    drawn = system.generate(["a tree", "a bolt on paper", "a flame on paper"], [1, 2, 3])
    assert drawn == [("echo", "a tree", 1), None, ("echo", "a flower on paper", 3)]
    assert calls == [["a tree", "a tree", "a flower on paper"]]  # the batch keeps its shape, so that no image changes
    assert system.generate(["a bolt"], [5]) == [None]
    assert (system.name, system.description) == ("guard", "the guard before echo")


def test_a_guard_that_looks_at_images_draws_again():
    class Never:
        card = DetectorCard("never", ("harm",), 0.5, "0" * 64)

        def detect(self, images):
            return np.ones((len(images), 1))

    class Once(Never):
        seen = 0

        def detect(self, images):
            self.seen += 1
            return np.full((len(images), 1), float(self.seen == 1))

    from PIL import Image

    seeds = []

    def generate(prompts, given):
        seeds.extend(given)
        return [Image.new("RGB", (4, 4), "red") for _ in prompts]

    plain = System("plain", generate)
    assert guarded_system(plain, Guard.from_policy(SHAPES, detector=Never()), name="g").generate(["a tree"], [7]) == [None]
    assert seeds == [7, 8, 9]
    assert guarded_system(plain, Guard.from_policy(SHAPES, detector=Once()), name="g").generate(["a tree"], [7])[0] is not None
    assert seeds[3:] == [7, 8]


def test_its_fingerprint_knows_the_system_and_the_rules():
    other = SHAPES.model_copy(update={"safe_styles": []})
    made = {
        guarded_system(inner, Guard.from_policy(policy), name="g").fingerprint
        for inner in (echo("a"), echo("b"))
        for policy in (SHAPES, other)
    }
    assert len(made) == 4


def test_each_image_is_drawn_by_its_run_and_each_run_is_made_ready_once():
    events = []

    def run(number):
        @contextmanager
        def ready():
            events.append(f"+{number}")
            yield
            events.append(f"-{number}")

        system = echo(f"run{number}")
        return System("many", system.generate, "several", fingerprint=str(number), ready=ready)

    suites = [make_suite(1, 3), make_suite(1, 4)]
    whole = suite_of_runs(suites)
    system = system_of_runs([run(0), run(1)])
    seeds = whole.seeds(99)  # the suite fixes its own
    assert len(whole) == len(suites[0]) + len(suites[1])
    with system.ready():
        half = len(whole) // 2
        drawn = system.generate([p.prompt for p in whole.prompts[:half]], seeds[:half])
        drawn += system.generate([p.prompt for p in whole.prompts[half:]], seeds[half:])
    for prompt, seed, (name, text, drawn_seed) in zip(whole.prompts, seeds, drawn, strict=True):
        number = int(prompt.id[1])
        assert (name, text, drawn_seed) == (f"run{number}", prompt.prompt, seed)
        assert seed == 2 * prompt_seed(number, prompt.id.partition("-")[2]) + number
    assert events == ["+0", "-0", "+1", "-1"]
    mixed = system.generate(["a", "b", "c"], [4, 5, 6])
    assert [name for name, _, _ in mixed] == ["run0", "run1", "run0"]
    assert system.fingerprint != system_of_runs([run(1), run(0)]).fingerprint


def test_one_run_is_the_suite_and_the_system_itself():
    suite = make_suite(1, 2)
    whole = suite_of_runs([suite])
    assert whole.seeds(5) == suite.seeds(0)
    assert system_of_runs([echo()]).generate(["a"], [3]) == [("echo", "a", 3)]


def test_refuses_nothing_at_all():
    with pytest.raises(UserError, match=r"suite_of_runs\.suites must hold at least one suite"):
        suite_of_runs([])
    with pytest.raises(UserError, match=r"system_of_runs\.systems must hold at least one system"):
        system_of_runs([])


def test_a_guard_whose_policy_names_held_out_concepts_is_marked_as_listed():
    first, *others = SHAPES.categories
    held_out = first.model_copy(update={"concepts": [one.model_copy(update={"held_out": True}) for one in first.concepts]})
    naming = SHAPES.model_copy(update={"categories": [held_out, *others]})
    plain, listed = (guarded_system(echo(), Guard.from_policy(policy), name="g") for policy in (SHAPES, naming))
    assert (plain.listed, listed.listed) == (False, True)
    assert guarded_system(listed, Guard.from_policy(SHAPES), name="h").listed
