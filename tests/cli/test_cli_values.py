"""Pictures, value encoder, drawing: the three commands one after the other, on a miniature with random weights."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.root import build
from valign.models.loading import load_model
from valign.models.value_encoder import load_value_encoder
from valign.models.value_pipeline import ValueGuidedPipeline


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(build(), [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def trained(tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    shared = ("--model", tiny_sd, "--device", "cpu")
    built = run(
        *("data", "build-values", *shared, "--policy", "shapes", "-o", folder / "data", "--no-flip"),
        *("--principle", "equal-heads", "--pictures", "1", "--steps", "1"),
    )
    options = ("--steps", "2", "--pairs-per-step", "2", "--no-flip", "--lora-rank", "1", "--set", "beta=500")
    done = run("train", "livo", *shared, "--data", folder / "data", "--out", folder / "run", *options)
    return folder, built, done


def test_the_set_is_counted_and_the_encoder_is_where_it_says(trained):
    folder, built, done = trained
    assert f"{folder / 'data'}: 32 pictures ready for training" in built
    assert [line.split() for line in built.splitlines() if "equal-heads" in line] == [["equal-heads", "16", "16", "16"]]
    assert str(folder / "run" / "values") in done
    record = json.loads((folder / "run" / "values" / "value_encoder.json").read_text())
    assert record["lora_rank"] == 1
    assert record["metadata"]["objective"]["beta"] == 500
    assert record["metadata"]["recipe"] == "livo"


def test_pictures_are_the_pipelines(trained, tiny_sd, tmp_path):
    folder, _, _ = trained
    shared = ("--model", tiny_sd, "--device", "cpu", "--guard", "none", "--steps", "2", "--count", "2", "--seed", "3")
    values = ("--values", folder / "run", "--policy", "shapes")
    run("generate", "a captain", "a tree", *shared, *values, "-o", tmp_path / "with")
    model = load_model(tiny_sd, device="cpu")
    prompts, seeds = ["a captain"] * 2 + ["a tree"] * 2, [3, 4, 3, 4]
    pipe = ValueGuidedPipeline(model, load_value_encoder(folder / "run", model))
    named = ["equal-heads"] * 2 + [None] * 2  # the policy's keywords find the captain and leave the tree alone
    wanted = pipe.generate(prompts, seeds=seeds, principles=named, steps=2)
    for number, picture in enumerate(wanted):
        with Image.open(tmp_path / "with" / f"{number:04d}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(picture))
    run("generate", "a captain", "a tree", *shared, "-o", tmp_path / "bare")
    for number in (2, 3):
        assert (tmp_path / "bare" / f"{number:04d}.png").read_bytes() == (tmp_path / "with" / f"{number:04d}.png").read_bytes()
    assert (tmp_path / "bare" / "0000.png").read_bytes() != (tmp_path / "with" / "0000.png").read_bytes()


def test_mistakes_stop_before_any_work(trained, tiny_sd, tmp_path):
    folder, _, _ = trained
    shared = ("--model", tiny_sd, "--device", "cpu")
    with pytest.raises(UserError, match=r"Choose another --out"):
        run("generate", "a tree", *shared, "-o", tmp_path)
    with pytest.raises(UserError, match="principle must be one of equal-heads; got 'loud'"):
        run("generate", "a tree", *shared, "--values", folder / "run", "--principle", "loud", "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="must be one of diffusion-dpo, livo; got 'kto'"):
        run("train", "livo", *shared, "--data", folder / "data", "--out", tmp_path / "run", "--objective", "kto")
    with pytest.raises(ValueError, match="LivoRecipe option must be one of"):
        run("train", "livo", *shared, "--data", folder / "data", "--out", tmp_path / "run", "--set", "gamma=1")
    with pytest.raises(UserError, match="principle must be one of"):
        run("data", "build-values", *shared, "--policy", "shapes", "--principle", "loud", "-o", tmp_path / "data")
    with pytest.raises(UserError, match="has no judge for"):
        run("data", "build-values", *shared, "--policy", "shapes", "--filter", "judge", "-o", tmp_path / "data")
    assert not (tmp_path / "data").exists()
