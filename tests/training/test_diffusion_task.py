"""Fine-tuning a U-Net on images: draws hang on image and step alone, every kind of method learns and resumes, files load."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from dying import killed_at
from peft import PeftModel
from PIL import Image
from torch.testing import assert_close
from typer.testing import CliRunner

from text_data import write_jsonl
from valign.checks import UserError
from valign.cli.root import build
from valign.data.tasks.captions import CaptionTask, read_captions
from valign.memory import MemoryConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import load_adapter
from valign.models.files.adapter_files import open_adapter, save_adapter
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preserving import PreserveData, parse_preserving
from valign.training.tasks.supervised import DiffusionTaskModel, SupervisedConfig, finetune, judge

TASK = CaptionTask(name="diffusion", kind="diffusion")
LOADED = ("full", "svfit", "clip-svd", "lora", "ailora", "dora", "sora", "full+trion")  # one of each way to attach and to save
SMALL = {"rank": 2, "learning_rate": 0.01}
SETTINGS = {"full+trion": {"rank": 2}, "lora": SMALL, "ailora": SMALL, "dora": SMALL, "sora": SMALL}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve flat images, red or blue as the caption says, in a table as the Hub's image folders have it."""
    place, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(12):
        colour = ("red", "blue")[number % 2]
        tint = {"red": (200, 30, 30), "blue": (30, 30, 200)}[colour]
        pixels = np.clip(random.normal(tint, 5, (70, 64, 3)), 0, 255).astype("uint8")
        Image.fromarray(pixels).save(place / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"{colour} {number}"})
    write_jsonl(place / "metadata.jsonl", rows)
    return place


@pytest.fixture(scope="module")
def data(folder):
    return read_captions(TASK, folder, share=0.3)


def run(base, data, out, name, **changes):
    given = {"steps": 6, "batch_size": 4, "validate_every": 0, "checkpoint_every": 2, "keep_checkpoints": 9, **changes}
    model = DiffusionTaskModel(load_model(base, device="cpu"))
    return model, finetune(model, data, out, parse_tuning(name, SETTINGS.get(name, {})), SupervisedConfig(**given))


@pytest.mark.parametrize("name", LOADED)
def test_methods_resume_to_the_same_bytes_and_their_files_draw_as_the_trained_model(name, tiny_sd, data, tmp_path, monkeypatch):
    model, result = run(tiny_sd, data, tmp_path / "straight", name)
    with killed_at(3, monkeypatch):  # after the checkpoint of step 2
        run(tiny_sd, data, tmp_path / "again", name)
    resumed, again = run(tiny_sd, data, tmp_path / "again", name)
    ours, theirs = model.state_dict(), resumed.state_dict()
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.scores == result.scores
    fresh = DiffusionTaskModel(load_model(tiny_sd, device="cpu")).eval()
    batch = fresh.batch(data.held_out)
    bare = fresh(batch)
    if name.startswith("full"):
        fresh.diffusion.denoiser = type(fresh.diffusion.denoiser).from_pretrained(result.adapter).eval()
    elif name in ("svfit", "clip-svd", "dora"):
        PeftModel.from_pretrained(fresh.diffusion.denoiser, result.adapter)
    else:
        load_adapter(fresh.diffusion, result.adapter, name="made")
    assert_close(fresh(batch), model.eval()(batch), rtol=1e-4, atol=1e-4)
    assert (bare - fresh(batch)).abs().max() > 1e-5


def test_diffusers_loads_the_lora_and_its_record_names_the_base(tiny_sd, data, tmp_path):
    model, result = run(tiny_sd, data, tmp_path / "run", "lora")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.load_lora_weights(result.adapter)
    assert pipe.get_active_adapters()
    record = json.loads((tmp_path / "run" / "adapter" / "valign.json").read_text())
    assert record["base_fingerprint"] == model.fingerprint
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"| fingerprint of the data | {data.fingerprint()} |" in card
    assert f"| training rows | {len(data.train)} |" in card
    assert f"learning_rate: {record['options']['method']['adapter']['learning_rate']}" in card


def test_training_brings_the_error_down(tiny_sd, data, tmp_path):
    before = judge(DiffusionTaskModel(load_model(tiny_sd, device="cpu")), data.held_out, batch_size=8)
    _, result = run(tiny_sd, data, tmp_path / "run", "full", steps=40, validate_every=10)
    assert result.scores["loss"] < before["loss"]
    assert result.score == "loss"


def test_batches_share_no_draw_and_cutting_them_changes_none(tiny_sd, data):
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"))
    rows = data.train[:4]
    torch.manual_seed(3)
    whole, parts = model.batch(rows), [model.batch(rows[:2]), model.batch(rows[2:])]
    for name in whole.inputs:
        assert torch.equal(whole.inputs[name], torch.cat([part.inputs[name] for part in parts])), name
    torch.manual_seed(4)
    assert not torch.equal(model.batch(rows).target, whole.target)
    model.eval()
    judged = model.batch(rows)
    torch.manual_seed(5)
    assert torch.equal(model.batch(rows).target, judged.target)
    assert len(set(map(float, judged.target.mean((1, 2, 3))))) == len(rows)


def test_the_loss_is_the_models_own(tiny_sd, data):
    """Against the formula, with every caption dropped and with none."""
    sd = load_model(tiny_sd, device="cpu")
    for share, caption in ((1.0, ""), (0.0, data.train[0].caption)):
        model = DiffusionTaskModel(sd, empty_prompt_prob=share)
        batch = model.batch(data.train[:1])
        answer = sd.denoiser(batch.inputs["noisy"], batch.inputs["timesteps"], sd.encode_prompts([caption]).embeds).sample
        assert_close(model.loss(batch), (answer - batch.target).square().mean())


def test_sdxl_and_velocity_models_train(tiny_sdxl, tiny_sd_v, data, tmp_path):
    for number, base in enumerate((tiny_sdxl, tiny_sd_v)):
        _, result = run(base, data, tmp_path / str(number), "lora", steps=2)
        assert np.isfinite(result.scores["loss"])


def test_accumulation_gives_the_same_gradient(tiny_sd, data, tmp_path):
    run(tiny_sd, data, tmp_path / "whole", "lora", steps=1)
    run(tiny_sd, data, tmp_path / "parts", "lora", steps=1, memory=MemoryConfig(accumulation=2))
    whole, parts = (MetricsLog(tmp_path / name / "metrics.jsonl").read()[0] for name in ("whole", "parts"))
    assert_close(whole["gradient_norm"], parts["gradient_norm"], rtol=1e-4, atol=0)


def test_images_of_several_shapes_stand_in_one_batch_and_count_alike(tiny_sd, tmp_path):
    for name, size in {"tall": (40, 80), "wide": (90, 40), "square": (64, 64)}.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    found = read_captions(TASK, tmp_path)
    rows = [*found.train, *found.held_out]
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"), buckets=True).eval()
    assert len({model.size_of(row) for row in rows}) == 3
    mixed = model.batch(rows)
    assert mixed.weight == 3
    assert_close(model.loss(mixed), sum(model.loss(model.batch([row])) for row in rows))
    assert "buckets" not in DiffusionTaskModel(load_model(tiny_sd, device="cpu")).reading()


def test_the_command_on_a_folder(tiny_sd, folder, tmp_path):
    command = [
        "finetune",
        "--model",
        str(tiny_sd),
        "--task",
        "diffusion",
        "--data",
        str(folder),
        "--set",
        "rank=2",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(build(), [*command, "--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["score"] == "loss"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": "nowhere.png"}, r"row 2 must name an image: .*nowhere\.png does not exist"),
        ({"file_name": "note.txt"}, r"row 2 must name an image: .*note\.txt must be an image that is read"),
        ({"text": " "}, r"row 2 must have a caption in text, got an empty one"),
        ({"text": None}, r"row 2 must have the column text, got file_name"),
    ],
)
def test_a_bad_row_is_named_before_any_work(change, message, folder, tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()[:3]]
    rows = [{**row, "file_name": str(folder / row["file_name"])} for row in rows]
    rows[1] = {name: value for name, value in (rows[1] | change).items() if value is not None}
    table = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read_captions(TASK, table)


def test_a_image_that_goes_away_is_named(folder, data, tiny_sd):
    row = data.train[0]
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"))
    hidden = row.source.rename(row.source.with_suffix(".gone"))
    try:
        with pytest.raises(UserError, match=r"\.png does not exist.* It must stay as it was until training ends"):
            model.batch([row])
    finally:
        hidden.rename(row.source)


def test_a_score_that_images_do_not_have():
    with pytest.raises(ValueError, match=r"CaptionTask\.score of diffusion must be one of loss, drawn, removed; got 'accuracy'"):
        CaptionTask(name="diffusion", kind="diffusion", score="accuracy")


@pytest.mark.parametrize("name", ["lora", "full"])
def test_penalties_hold_a_unet_to_what_it_drew_and_resume(name, tiny_sd, data, tmp_path, monkeypatch):
    kept = PreserveData(calibration=data.held_out)
    objectives = parse_preserving("agl+kl", {"lambda_A": 1.0, "weight": 5.0})[0]

    def train(out, preserve, steps=4):
        model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"))
        config = SupervisedConfig(steps=steps, batch_size=2, validate_every=0, checkpoint_every=2)
        settings = {"learning_rate": 1e-3} if name == "full" else SMALL
        finetune(model, data, out, parse_tuning(name, settings), config, preserve=preserve, beside=kept if preserve else None)
        return model.eval()

    straight = train(tmp_path / "straight", objectives)
    with killed_at(3, monkeypatch):
        train(tmp_path / "again", objectives)
    resumed = train(tmp_path / "again", objectives)
    ours, theirs = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    log = MetricsLog(tmp_path / "straight" / "metrics.jsonl").read()
    assert abs(log[0]["kl"]) < 1e-8
    assert log[-1]["kl"] > 0
    assert log[-1]["agl"] > 0
    start = DiffusionTaskModel(load_model(tiny_sd, device="cpu")).eval()
    batch = start.batch(data.held_out)
    before = start(batch)
    moved = [(model(batch) - before).square().mean() for model in (straight, train(tmp_path / "plain", {}))]
    assert moved[0] < moved[1]


def test_answers_are_compared_on_images_of_one_size(tiny_sd, data, tmp_path):
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"), buckets=True)
    kept, objectives = PreserveData(calibration=data.held_out), parse_preserving("kl")[0]
    with pytest.raises(UserError, match=r"--preserve kl must go with images of one size, got --buckets"):
        finetune(model, data, tmp_path / "run", parse_tuning("lora"), SupervisedConfig(steps=2), preserve=objectives, beside=kept)


def test_words_are_not_preserved_on_images(tiny_sd, data, tmp_path):
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"))
    with pytest.raises(UserError, match=r"--preserve constrained-sft must go with a language model, got diffusion\. Use agl"):
        finetune(
            model,
            data,
            tmp_path / "run",
            parse_tuning("lora"),
            SupervisedConfig(steps=2),
            preserve=parse_preserving("constrained-sft")[0],
        )


def test_captions_that_are_longer_than_what_is_read_are_counted(tiny_sd, data):
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"))
    long = replace(data.train[0], caption="red " * 200)
    assert model.cut([*data.train, long]) == 1


def test_image_grids_at_fixed_prompts_while_training(tiny_sd, data, tmp_path):
    _, result = run(
        tiny_sd,
        data,
        tmp_path / "run",
        "lora",
        steps=2,
        sample_every=1,
        sample_steps=2,
        sample_prompts=("a", "b"),
        schedule="cosine",
    )
    grids = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in grids] == ["step-000001.png", "step-000002.png"]
    assert result.steps == 2
    first, last = (np.asarray(Image.open(path)) for path in grids)
    half = len(first) // 2
    assert np.array_equal(first[: half - 4], last[: half - 4])  # the base, above
    assert not np.array_equal(first[half:], last[half:])


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
def test_text_encoders_and_convolutions_learn_and_their_file_is_the_trained_model(base, request, data, tmp_path):
    folder, config = request.getfixturevalue(base), SupervisedConfig(steps=2, batch_size=4, validate_every=0, checkpoint_every=0)
    model = DiffusionTaskModel(load_model(folder, device="cpu"), text_encoder=True, convolutions=True)
    result = finetune(model, data, tmp_path, parse_tuning("lora", SMALL), config)
    opened = open_adapter(result.adapter)
    ups = {module: lora.up.abs().max() for module, lora in opened.items()}
    learnt = {module for module, size in ups.items() if size > 0}
    texts = {part for part in model.diffusion.components if any(module.startswith(f"{part}.") for module in learnt)}
    assert texts == {"text_encoder", *(("text_encoder_2",) if base == "tiny_sdxl" else ())}  # gradients reached every network
    assert any(opened.entries[module].kernel == (3, 3) for module in learnt)
    fresh = DiffusionTaskModel(load_model(folder, device="cpu")).eval()
    bare = fresh(fresh.batch(data.held_out))
    load_adapter(fresh.diffusion, result.adapter, name="made")
    fresh._texts.clear()  # texts of the bare encoder
    ours = model.eval()(model.batch(data.held_out))
    assert_close(fresh(fresh.batch(data.held_out)), ours, rtol=1e-4, atol=1e-4)
    assert (bare - ours).abs().max() > 1e-5
    load_adapter(unet_only := load_model(folder, device="cpu"), without_texts(opened, tmp_path / "unet"), name="made")
    assert (
        DiffusionTaskModel(unet_only).eval()(DiffusionTaskModel(unet_only).eval().batch(data.held_out)) - ours
    ).abs().max() > 1e-6


def without_texts(opened, folder):
    save_adapter(folder, {name: lora for name, lora in opened.items() if not name.startswith("text_encoder")}, metadata={})
    return folder


def test_micro_batches_give_a_text_encoder_the_same_gradients(tiny_sd, data, tmp_path):
    factors = []
    for parts in (None, 2):
        model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"), text_encoder=True)
        memory = MemoryConfig(accumulation=parts, gradient_checkpointing=parts is not None)
        config = SupervisedConfig(steps=2, batch_size=4, validate_every=0, checkpoint_every=0, memory=memory)
        result = finetune(model, data, tmp_path / str(parts), parse_tuning("lora", SMALL), config)
        opened = open_adapter(result.adapter)
        factors.append({name: lora.delta() for name, lora in opened.items() if name.startswith("text_encoder")})
    once, twice = factors
    assert max(delta.abs().max() for delta in once.values()) > 1e-4
    for name, delta in once.items():
        assert_close(twice[name], delta, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "adapter", "message"),
    [
        ({"text_encoder": True}, "dora", "--text-encoder must go with a method that ends as plain LoRA"),
        ({"convolutions": True}, "sora", "The targets of SoRAOptions must be linear modules or convolutions of 1 x 1, got"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_the_first_step(options, adapter, message, tiny_sd, data, tmp_path):
    model = DiffusionTaskModel(load_model(tiny_sd, device="cpu"), **options)
    with pytest.raises(UserError, match=message):
        finetune(model, data, tmp_path, parse_tuning(adapter), SupervisedConfig(steps=1, validate_every=0))


def test_a_trained_text_encoder_must_stay(tiny_sd, folder, tmp_path):
    model = load_model(tiny_sd, device="cpu", memory=MemoryConfig(phased=True))
    with pytest.raises(UserError, match=r"--text-encoder trains networks that memory\.phased sends away"):
        DiffusionTaskModel(model, text_encoder=True)
    task = ["finetune", "-m", str(tiny_sd), "-d", str(folder), "-o", str(tmp_path / "run"), "--steps", "1"]
    for more, said in (
        (["-t", "diffusion", "--text-encoder", "--phased"], "memory.phased has no effect with --text-encoder"),
        (["-t", "chat", "--text-encoder"], "--text-encoder is of diffusion models, got the task chat"),
        (["-t", "sst2", "--convolutions"], "--convolutions is of diffusion models, got the task sst2"),
    ):
        with pytest.raises(UserError, match=said.replace(".", r"\.")):
            CliRunner().invoke(build(), [*task, *more], catch_exceptions=False)
