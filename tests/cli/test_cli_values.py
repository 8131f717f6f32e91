"""Images, value encoder, drawing: the three commands one after the other, on a miniature with random weights."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.root import build
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.value_encoder import load_value_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline, mixes


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(build(), [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def pixels(path):
    """Of an image file, whatever else it says of itself."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


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
    assert f"{folder / 'data'}: 32 images ready for training" in built
    assert [line.split() for line in built.splitlines() if "equal-heads" in line] == [["equal-heads", "16", "16", "16"]]
    assert str(folder / "run" / "values") in done
    record = json.loads((folder / "run" / "values" / "value_encoder.json").read_text())
    assert record["lora_rank"] == 1
    assert record["metadata"]["objective"]["beta"] == 500
    assert record["metadata"]["recipe"] == "livo"


def test_images_are_the_pipelines(trained, tiny_sd, tmp_path):
    folder, _, _ = trained
    shared = ("--model", tiny_sd, "--device", "cpu", "--guard", "none", "--steps", "2", "--count", "2", "--seed", "3")
    values = ("--values", folder / "run", "--policy", "shapes")
    run("generate", "a captain", "a tree", *shared, *values, "-o", tmp_path / "with")
    model = load_model(tiny_sd, device="cpu")
    prompts, seeds = ["a captain"] * 2 + ["a tree"] * 2, [3, 4, 3, 4]
    pipe = ValueGuidedPipeline(model, load_value_encoder(folder / "run", model))
    named = ["equal-heads"] * 2 + [None] * 2  # the policy's keywords find the captain and leave the tree alone
    wanted = pipe.generate(prompts, seeds=seeds, principles=named, sampling=SamplingConfig(steps=2))
    for number, expected in enumerate(wanted):
        with Image.open(tmp_path / "with" / f"{number:04d}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected))
    # Each prompt in a batch of its own, as another batch size may round otherwise: the tree is the bare model's, bit for bit.
    for prompt, name in (("a tree", "tree"), ("a captain", "captain")):
        run("generate", prompt, *shared, *values, "-o", tmp_path / f"{name}-with")
        run("generate", prompt, *shared, "-o", tmp_path / f"{name}-bare")
    for number in (0, 1):
        tree, captain = (
            [tmp_path / f"{name}-{how}" / f"{number:04d}.png" for how in ("with", "bare")] for name in ("tree", "captain")
        )
        assert np.array_equal(pixels(tree[0]), pixels(tree[1]))
        assert not np.array_equal(pixels(captain[0]), pixels(captain[1]))


@pytest.fixture(scope="module")
def probed(tiny_sd, tmp_path_factory):
    """A data set's prompts alone, and the probe that the command fits on them."""
    from valign.data.prompts.pairs import PromptPair, write_pairs

    folder = tmp_path_factory.mktemp("probe")
    words = (("flame", "violence"), ("key", "illegal-activity"))
    pairs = [
        PromptPair(f"{word}-{number}", f"a {word} {where} a photo", f"a heart {where} a photo", (category,))
        for word, category in words
        for number, where in enumerate(("in", "on", "of", "with", "and", "under"))
    ]
    write_pairs(folder / "data" / "prompts" / "pairs.parquet", pairs)
    (folder / "benign.csv").write_text("prompt\na tree\na captain\na house\n")
    command = ["train", "retriever", "--model", tiny_sd, "--device", "cpu", "--policy", "shapes", "-o", folder / "probe"]
    command += ["--data", folder / "data", "--benign", folder / "benign.csv", "--fit", "100", "--json"]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(build(), [str(part) for part in command], catch_exceptions=False)
    return folder, done


def test_the_probe_is_fitted_and_its_figures_are_printed(probed, tiny_sd):
    from valign.guard import probe_retriever
    from valign.models.heads.text_probe import load_probe
    from valign.policy import load_policy

    folder, done = probed
    told = json.loads(done.stdout)
    assert told["probe"] == str(folder / "probe")
    assert told["prompts"]["violence"] == 6
    rows = {line.split()[0]: line.split() for line in done.stderr.splitlines() if line.split()}
    assert rows["violence"][1] == "6"
    assert "harmless prompts: 9; false alarms:" in done.stderr
    assert "threshold 0.5, given" in done.stderr
    retriever = probe_retriever(load_policy("shapes"), load_probe(folder / "probe", load_model(tiny_sd, device="cpu")))
    assert retriever.retrieve("a flame in a photo") == "no-rays"
    assert retriever.retrieve("a captain") == "equal-heads"


def test_generate_and_guard_read_with_the_probe(trained, probed, tiny_sd, tmp_path):
    folder, probe = trained[0], probed[0] / "probe"
    shared = ("--model", tiny_sd, "--device", "cpu", "--steps", "2", "--seed", "3")
    values = ("--values", folder / "run", "--policy", "shapes", "--mixing", "1", "--value-retriever", probe)
    run("generate", "a captain", *shared, "--guard", "none", *values, "-o", tmp_path / "with.png")
    run("generate", "a captain", *shared, "--guard", "none", *values[:-2], "-o", tmp_path / "keyword.png")
    assert np.array_equal(pixels(tmp_path / "with.png"), pixels(tmp_path / "keyword.png"))  # bias goes by keyword either way
    site = tmp_path / "site.yaml"
    site.write_text("version: 1\nid: site\ntitle: Site\nextends: shapes\nguard: {stages: [probe]}\n")
    line = ["guard", "check", "a flame in a photo", "--policy", site, "--json"]
    checked = json.loads(run(*line, "--probe", probe, "--model", tiny_sd))
    assert (checked["action"], checked["stop"]) == ("rewrite", "probe")
    with pytest.raises(UserError, match="--probe needs the model that it was fitted on, got none"):
        run(*line, "--probe", probe)
    with pytest.raises(UserError, match="lists the stage probe, which needs a probe of the model"):
        run(*line)
    done = ["generate", "a heart in a photo", *shared, "--guard", site, "--value-retriever", probe, "-o", tmp_path / "kept.png"]
    run(*done)
    assert (tmp_path / "kept.png").exists()


def test_another_text_encoder_is_refused_before_any_image(trained, probed, tiny_sdxl, tmp_path):
    with pytest.raises(UserError, match="was fitted on text encoders"):
        run(
            *("generate", "a captain", "--model", tiny_sdxl, "--device", "cpu", "--guard", "none"),
            *("--value-retriever", probed[0] / "probe", "-o", tmp_path / "new.png"),
        )
    assert not (tmp_path / "new.png").exists()


def test_behind_a_guard_the_token_is_a_stage_of_it(trained, tiny_sd, tmp_path):
    folder, _, _ = trained
    shared = ("--model", tiny_sd, "--device", "cpu", "--steps", "2", "--seed", "3", "--values", folder / "run")
    chosen = ("--policy", "shapes", "--mixing", "1")
    run("generate", "a captain", *shared, *chosen, "--guard", "none", "-o", tmp_path / "free.png")
    command = [str(part) for part in ("generate", "a captain", *shared, *chosen, "--guard", "shapes", "-o", tmp_path / "kept.png")]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(build(), command, catch_exceptions=False)
    assert "Generated under the principle equal-heads." in done.stderr
    assert np.array_equal(pixels(tmp_path / "kept.png"), pixels(tmp_path / "free.png"))
    run("generate", "a tree", *shared, "--principle", "captain", "--mixing", "1", "--guard", "none", "-o", tmp_path / "tree.png")
    run("generate", "a tree", *shared, *chosen, "--guard", "none", "-o", tmp_path / "bare.png")
    # the alias names the principle for any prompt
    assert not np.array_equal(pixels(tmp_path / "tree.png"), pixels(tmp_path / "bare.png"))


def test_evaluate_compares_the_encoder_with_the_base(trained, probed, tiny_sd, tmp_path, monkeypatch):
    from valign.cli import evaluate as cli
    from valign.evaluation import EvalPrompt, Suite, write_suite
    from valign.interfaces import DetectorCard

    class Brightness:
        card = DetectorCard("brightness", ("bright",), 0.5, "0" * 64, 0.9, 0.8, 50, 50, covers="all")

        def detect(self, images):
            return np.array([[np.asarray(image).mean() / 255] for image in images])

    folder, _, _ = trained
    seeds = (1, 3, 5)
    prompts = [EvalPrompt(f"u{seed}", "a captain", "hate", "explicit", seed=seed) for seed in seeds]
    write_suite(tmp_path / "suite.jsonl", Suite("captains", (*prompts, EvalPrompt("b", "a tree"), EvalPrompt("c", "a house"))))
    monkeypatch.setattr(cli, "resolve_detector", lambda name, model: Brightness())
    out = tmp_path / "out"
    options = ("--model", tiny_sd, "--device", "cpu", "--policy", "shapes", "--steps", "2", "--detector", "oracle")
    printed = run("evaluate", *options, "--suite", tmp_path / "suite.jsonl", "--values", f"livo={folder / 'run'}", "-o", out)
    assert printed.strip() == str(out / "report.html")
    summary = json.loads((out / "summary.json").read_text())
    assert [system["name"] for system in summary["systems"]] == ["base", "livo"]
    assert summary["systems"][1]["rmse"]["mean"]["value"] == 0  # of benign prompts: no keyword, no token
    drawn = {name: [(out / "images" / name / f"u{seed}.png").read_bytes() for seed in seeds] for name in ("base", "livo")}
    assert [a != b for a, b in zip(drawn["base"], drawn["livo"])] == [mixes(seed, 0.5) for seed in seeds]
    probe = probed[0] / "probe"
    again = ("--suite", tmp_path / "suite.jsonl", "--values", f"livo={folder / 'run'}", "--value-retriever", probe)
    run("evaluate", *options, *again, "-o", tmp_path / "read")
    for seed in seeds:  # the captains' principle goes by keyword with the probe, too
        assert (tmp_path / "read" / "images" / "livo" / f"u{seed}.png").read_bytes() == drawn["livo"][seeds.index(seed)]
    with pytest.raises(UserError, match="--value-retriever finds the principles of --values, which names no encoder"):
        run("evaluate", *options, "--suite", tmp_path / "suite.jsonl", "--value-retriever", probe, "-o", tmp_path / "new")
    with pytest.raises(UserError, match=r"--values.* /nowhere does not exist"):
        run("evaluate", *options, "--suite", tmp_path / "suite.jsonl", "--values", "livo=/nowhere", "-o", tmp_path / "new")


def test_mistakes_stop_before_any_work(trained, tiny_sd, tmp_path):
    folder, _, _ = trained
    shared = ("--model", tiny_sd, "--device", "cpu")
    with pytest.raises(UserError, match=r"Choose another --out"):
        run("generate", "a tree", *shared, "-o", tmp_path)
    with pytest.raises(UserError, match="principle must be one of equal-heads; got 'loud'"):
        run("generate", "a tree", *shared, "--values", folder / "run", "--principle", "loud", "-o", tmp_path / "new.png")
    assert not (tmp_path / "new.png").exists()
    with pytest.raises(ValueError, match="must be one of diffusion-dpo, livo; got 'kto'"):
        run("train", "livo", *shared, "--data", folder / "data", "--out", tmp_path / "run", "--objective", "kto")
    with pytest.raises(ValueError, match="--set must name options of the command, got gamma"):
        run("train", "livo", *shared, "--data", folder / "data", "--out", tmp_path / "run", "--set", "gamma=1")
    with pytest.raises(UserError, match="principle must be one of"):
        run("data", "build-values", *shared, "--policy", "shapes", "--principle", "loud", "-o", tmp_path / "data")
    with pytest.raises(UserError, match="has no judge for"):
        run("data", "build-values", *shared, "--policy", "shapes", "--filter", "judge", "-o", tmp_path / "data")
    assert not (tmp_path / "data").exists()
