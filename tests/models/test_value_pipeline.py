import numpy as np
import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.interfaces import SamplingConfig
from valign.models.diffusion.guidance.negative import NegativePrompt
from valign.models.diffusion.guidance.sld import SafeLatentDiffusion
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.value_encoder import ValueText, copy_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline, mixes

PRINCIPLES = (
    ValueText("calm", "calm colours"),
    ValueText("bright", "bright colours"),
    ValueText("alike", "light and dark alike", kind="bias"),
)
DRAW = {"sampling": SamplingConfig(steps=2, guidance_scale=4.0)}


def pixels(images):
    return [np.asarray(image) for image in images]


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(pixels(left), pixels(right), strict=True))


def guided(folder, layout="reference", **options):
    model = load_model(folder, device="cpu")
    return ValueGuidedPipeline(model, copy_encoder(model, PRINCIPLES, layout=layout), **options)


@pytest.mark.parametrize("layout", ["reference", "padded"])
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_without_the_token_images_are_the_base_models(family, layout, request):
    pipe = guided(request.getfixturevalue(family), layout)
    prompts, seeds = ["a cat", "a dog in a tree"], [1, 2]
    base = pipe.model.generate(prompts, seeds=seeds, **DRAW)
    assert same(pipe.generate(prompts, seeds=seeds, **DRAW), base)
    with_token = pipe.generate(prompts, seeds=seeds, principles="calm", **DRAW)
    assert not same(with_token[:1], base[:1])
    assert not same(with_token[1:], base[1:])
    with pipe.encoder.off():
        assert same(pipe.generate(prompts, seeds=seeds, principles="calm", **DRAW), base)
    assert same(pipe.generate(prompts, seeds=seeds, principles="alike", mixing=0.0, **DRAW), base)
    assert same(pipe.generate(prompts, seeds=seeds, principles="calm", mixing=0.0, **DRAW), with_token)  # toxicity is always on


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def test_both_branches_have_one_length_and_only_one_has_the_token(family, request):
    pipe = guided(request.getfixturevalue(family))
    cond, negative = pipe.conditions(["a cat"], "calm")
    words = len(pipe.model.pipe.tokenizer("a cat").input_ids)
    assert cond.embeds.shape[1] == negative.embeds.shape[1] == words + 1 < 77
    assert_close(cond.embeds[:, 0], pipe.encoder.token("calm", ["a cat"]), rtol=0, atol=0)
    assert torch.equal(cond.embeds[:, 1:], pipe.model.encode_prompts(["a cat"], length=words).embeds)
    assert torch.equal(negative.embeds, pipe.model.encode_prompts([""], length=words + 1).embeds)
    cond, negative = pipe.conditions(["cat " * 200], "calm")
    assert cond.embeds.shape[1] == negative.embeds.shape[1] == 77  # 76 tokens of the prompt

    pipe = guided(request.getfixturevalue(family), "padded")
    cond, negative = pipe.conditions(["a cat", "dog"], "calm")
    assert cond.embeds.shape[1] == negative.embeds.shape[1] == 78
    assert torch.equal(cond.embeds[:, 1:], pipe.model.encode_prompts(["a cat", "dog"]).embeds)
    empty = pipe.model.encode_prompts([""]).embeds[0]
    assert torch.equal(negative.embeds[0], torch.cat([empty, empty[-1:]]))


def test_one_more_copy_of_a_key_is_where_it_stands_no_matter(tiny_sd):
    pipe = guided(tiny_sd, "padded")
    _, negative = pipe.conditions(["a cat"], "calm")
    moved = torch.cat([negative.embeds[:, -1:], negative.embeds[:, :-1]], dim=1)  # the copy in front, where the token stands
    noisy, t = torch.randn(1, *pipe.model.latent_shape), torch.tensor([500])
    answers = [pipe.model.denoiser(noisy, t, encoder_hidden_states=embeds)[0] for embeds in (negative.embeds, moved)]
    assert_close(*answers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["reference", "padded"])
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_the_diffusers_call_draws_what_the_sampler_draws(family, layout, request):
    pipe = guided(request.getfixturevalue(family), layout)
    latents = torch.randn(pipe.model.latent_shape, generator=torch.Generator().manual_seed(5))[None]
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "latents": latents, "generator": torch.Generator().manual_seed(0)}
    pipe.model.pipe.set_progress_bar_config(disable=True)
    (called,) = pipe("a cat", principle="calm", **options).images
    (drawn,) = pipe.generate(["a cat"], seeds=[5], principles="calm", **DRAW)
    assert np.abs(np.asarray(called, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1
    plain = pipe("a cat", **options).images
    assert same(plain, pipe.model.pipe("a cat", **options).images)


def test_guidances_work_beside_the_token(tiny_sd):
    pipe = guided(tiny_sd)
    shared = {"seeds": [1, 2], "principles": "calm", **DRAW}
    plain = pipe.generate(["a cat", "a red dog"], **shared)
    assert same(pipe.generate(["a cat", "a red dog"], guidance=NegativePrompt(""), **shared), plain)
    assert not same(pipe.generate(["a cat", "a red dog"], guidance=NegativePrompt("a blue tree"), **shared), plain)
    never = SafeLatentDiffusion(text="a gun", threshold=-float("inf"))
    assert same(pipe.generate(["a cat", "a red dog"], guidance=never, **shared), plain)


def test_a_image_does_not_depend_on_its_company(tiny_sd):
    pipe = guided(tiny_sd)
    prompts, principles = ["a cat", "a red dog in a tree", "a cat", "a cat"], ["calm", "bright", None, "bright"]
    together = pipe.generate(prompts, seeds=[1, 2, 3, 4], principles=principles, **DRAW)
    alone = [
        pipe.generate([prompt], seeds=[seed], principles=[name], **DRAW)[0]
        for prompt, seed, name in zip(prompts, [1, 2, 3, 4], principles, strict=True)
    ]
    for left, right in zip(pixels(together), pixels(alone), strict=True):  # as the sampler promises of batches
        assert abs(left.astype(int) - right).max() <= 1


def test_mixing_is_fixed_by_the_seed_and_has_the_share():
    assert not any(mixes(seed, 0.0) for seed in range(100))
    assert all(mixes(seed, 1.0) for seed in range(100))
    hits = [mixes(seed, 0.5) for seed in range(4000)]
    assert abs(sum(hits) / 4000 - 0.5) < 4 * (0.25 / 4000) ** 0.5  # four standard errors
    assert hits == [mixes(seed, 0.5) for seed in range(4000)]
    assert all(mixes(seed, 0.7) for seed in range(4000) if hits[seed])  # a larger share keeps those it had


class Always:
    def __init__(self, name):
        self.name = name

    def retrieve(self, prompt):
        return self.name

    def fingerprint(self):
        return str(self.name)


def test_the_retriever_decides_where_nothing_is_named(tiny_sd):
    model = load_model(tiny_sd, device="cpu")
    encoder = copy_encoder(model, PRINCIPLES)
    named = ValueGuidedPipeline(model, encoder).generate(["a cat"], seeds=[1], principles="calm", **DRAW)
    assert same(ValueGuidedPipeline(model, encoder, Always("calm")).generate(["a cat"], seeds=[1], **DRAW), named)
    base = model.generate(["a cat"], seeds=[1], **DRAW)
    for nothing in (None, "never trained"):
        assert same(ValueGuidedPipeline(model, encoder, Always(nothing)).generate(["a cat"], seeds=[1], **DRAW), base)


def test_bad_calls_stop_before_any_work(tiny_sd, tiny_sd_v, as_in_use):
    pipe = guided(tiny_sd)
    with pytest.raises(UserError, match="principle must be one of calm, bright, alike; got 'loud'"):
        pipe.generate(["a cat"], seeds=[1], principles="loud")
    with pytest.raises(UserError, match="An image takes one principle"):
        pipe.generate(["a cat"], seeds=[1], principles=[["calm", "bright"]])
    with pytest.raises(ValueError, match="one, or one per prompt, got 2 for 1"):
        pipe.generate(["a cat"], seeds=[1], principles=["calm", "calm"])
    with pytest.raises(ValueError, match=r"mixing must be in \[0, 1\], got 1\.5"):
        pipe.generate(["a cat"], seeds=[1], mixing=1.5)
    with pytest.raises(ValueError, match="one seed per prompt, got 2 for 1"):
        pipe.generate(["a cat"], seeds=[1, 2])
    with pytest.raises(UserError, match="must get texts, got prompt_embeds"):
        pipe("a cat", principle="calm", prompt_embeds=torch.zeros(1, 77, 32))
    with pytest.raises(UserError, match="belongs to another base model"):
        ValueGuidedPipeline(load_model(tiny_sd_v, device="cpu"), pipe.encoder)
