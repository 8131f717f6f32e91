"""Miniature pipelines: reproducible, loadable by stock diffusers, at home with any text."""

import pytest
import torch
from diffusers import DiffusionPipeline

from valign.checks import UserError
from valign.models.diffusion.miniature import WORDS, build_miniature, build_tokenizer
from valign.models.files.fingerprint import fingerprint_folder


def test_same_arguments_same_bytes_and_the_global_generator_is_left_alone(tmp_path):
    state = torch.random.get_rng_state()
    prints = [fingerprint_folder(build_miniature(tmp_path / str(i), seed=seed, width=16)) for i, seed in enumerate((0, 0, 1))]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("family", "prediction"), [("stable-diffusion", "epsilon"), ("sdxl", "velocity")])
def test_stock_diffusers_loads_and_runs_it(tmp_path, family, prediction):
    folder = build_miniature(tmp_path / "m", family=family, prediction=prediction, width=16)
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    assert pipe.scheduler.config.prediction_type == {"epsilon": "epsilon", "velocity": "v_prediction"}[prediction]


def test_the_tokenizer_knows_its_words_and_any_byte():
    tokenizer = build_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end
    text = "Zwölf Boxkämpfer: 猫 №7 \N{SNOWMAN} don't"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
    assert ids.count(tokenizer.unk_token_id) == 1  # only as the end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "flux"}, r"family must be one of stable-diffusion, sdxl; got 'flux'"),
        ({"prediction": "sample"}, r"prediction must be one of epsilon, velocity; got 'sample'"),
        ({"width": 4}, r"width must be in \[8, inf\), got 4"),
        ({"width": 12}, r"width must be a multiple of 8, got 12"),
    ],
)
def test_refuses_bad_options(tmp_path, options, message):
    build = getattr(build_miniature, "__wrapped__", build_miniature)  # past the type checker, to our own words
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_refuses_an_existing_folder(tiny_sd):
    with pytest.raises(UserError, match="exists"):
        build_miniature(tiny_sd)
