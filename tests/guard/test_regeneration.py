"""Generate, check, generate again: counts, order of styles, seeds, and never a flagged image."""

import numpy as np
import pytest
from guard_stand_ins import Watcher
from PIL import Image

from valign.checks import UserError
from valign.guard import Guard, GuardedPipeline
from valign.guard.images.image_check import check_image
from valign.interfaces import SamplingConfig

RED = Image.new("RGB", (4, 4), "red")


def recording():
    """A function that makes one image whatever it is asked, and the list of what it was asked."""
    asked = []

    def generate(caption, seed):
        asked.append((caption, seed))
        return RED

    return generate, asked


def illustrated(guard, generate, prompt, *, seed=0):
    return guard.illustrate(generate, guard.guard(prompt), seed=seed)


@pytest.mark.parametrize(("flags", "tries"), [((), 1), ((0,), 2), ((0, 1), 3)])
def test_walks_the_styles_until_an_image_passes(policy, flags, tries):
    generate, asked = recording()
    image = illustrated(Guard.from_policy(policy, detector=Watcher(flags)), generate, "a lighthouse", seed=5)
    captions = ["a lighthouse", *(f"a lighthouse, {style}" for style in policy.safe_styles)]
    assert asked == [(caption, 5 + i) for i, caption in enumerate(captions[:tries])]
    assert image.image is RED
    assert image.checked


def test_a_flagged_image_is_never_returned(policy):
    generate, asked = recording()
    image = illustrated(Guard.from_policy(policy, detector=Watcher(range(9))), generate, "a lighthouse")
    assert (image.image, image.blocked, len(asked)) == (None, True, 1 + policy.guard.max_regenerations)
    assert all(one.verdict.fired for one in image.attempts)


def test_a_failing_detector_returns_no_image(policy):
    generate, _ = recording()
    assert illustrated(Guard.from_policy(policy, detector=Watcher(fails=True)), generate, "a lighthouse").blocked


def test_a_policy_may_refuse_instead_of_trying_again(policy):
    rules = policy.model_copy(update={"cases": policy.cases.model_copy(update={"unsafe_image": "block"})})
    generate, asked = recording()
    assert illustrated(Guard.from_policy(rules, detector=Watcher((0,))), generate, "a lighthouse").blocked
    assert len(asked) == 1


def test_a_blocked_prompt_gives_no_image(policy):
    generate, asked = recording()
    assert illustrated(Guard.from_policy(policy), generate, "Привет, большой мир").blocked
    assert asked == []


def test_without_a_detector_the_image_is_marked_unchecked(policy):
    generate, _ = recording()
    image = illustrated(Guard.from_policy(policy), generate, "a lighthouse")
    assert (image.image, image.checked) == (RED, False)


def test_a_black_image_is_a_failure():
    assert check_image(Watcher(), Image.new("RGB", (4, 4))).outcome == "error"
    assert check_image(Watcher(), RED).outcome == "pass"


@pytest.mark.parametrize(("score", "found"), [(0.5, ("fire", "harm")), (float(np.nextafter(0.5, 0)), ("pass", ""))])
def test_a_score_at_the_threshold_fires(score, found):
    class Even(Watcher):
        def detect(self, images):
            return np.array([[score]])

    verdict = check_image(Even(), RED)
    assert (verdict.outcome, verdict.category) == found
    assert (verdict.score, verdict.threshold) == (score, 0.5)


def test_a_score_out_of_range_is_a_failure():
    class Wild(Watcher):
        def detect(self, images):
            return np.array([[1.5]])

    assert check_image(Wild(), RED).outcome == "error"


class Pipe:
    """Looks like a diffusers pipeline."""

    def __init__(self):
        self.calls = []

    def __call__(self, *, prompt, generator, **options):
        self.calls.append((prompt, generator.initial_seed()))
        return type("Output", (), {"images": [RED]})()


def test_a_guarded_pipeline_generates_what_the_guard_allows(guard):
    pipe = Pipe()
    output = GuardedPipeline(pipe, guard)(["a lighthouse", "a naked man", "Привет, большой мир"], seed=3)
    assert [image is None for image in output.images] == [False, False, True]
    assert output.nsfw_content_detected == [False, False, True]
    assert pipe.calls == [("a lighthouse", 3), (output.records[1].result.prompt, 4)]


def test_a_guarded_pipeline_generates_nothing_where_one_is_not_a_prompt(guard):
    pipe = Pipe()
    with pytest.raises(UserError, match=r"The prompt must not be blank"):
        GuardedPipeline(pipe, guard)(["a lighthouse", " "])
    assert pipe.calls == []


@pytest.mark.parametrize(
    "option",
    [{"prompt_embeds": 1}, {"prompt_2": "a naked man"}, {"output_type": "latent"}, {"num_images_per_prompt": 2}, {"generator": 1}],
)
def test_a_guarded_pipeline_refuses_ways_round_the_guard(guard, option):
    with pytest.raises(ValueError, match="GuardedPipeline"):
        GuardedPipeline(Pipe(), guard)("a lighthouse", **option)


def test_an_allowed_prompt_gives_the_bare_models_image(policy, tiny_sd):
    from valign.models.diffusion.loading import load_model

    model = load_model(tiny_sd, device="cpu")
    bare = model.generate(["a lighthouse"], seeds=[7], sampling=SamplingConfig(steps=2))[0]
    guarded = Guard.from_policy(policy).generate(model, "a lighthouse", seed=7, sampling=SamplingConfig(steps=2))
    assert guarded.image.tobytes() == bare.tobytes()
