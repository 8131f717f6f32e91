"""Fine-tuning on labelled texts: every method learns, resumes to the same bytes, and is saved as peft loads it."""

import json
from pathlib import Path

import pytest
import torch
from dying import killed_at
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from text_data import glue_folder, single, tiny_bert, tiny_gpt, write_jsonl
from valign.adapters import ADAPTERS
from valign.checks import UserError
from valign.cli.root import build
from valign.data.tasks.texts import TextTask, named_task, read_data
from valign.memory import MemoryConfig
from valign.models.heads.task_model import Target
from valign.models.language.text_model import load_text_model
from valign.runs import Run
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.supervised import SupervisedConfig, finetune

SMALL = {"rank": 2, "learning_rate": 0.02}
QUICK = {"rank": 2, "learning_rate": 0.1}  # both factors start small
SETTINGS = {  # sizes for weights of 16 x 16
    "lora-sb": {"rank": 4},
    "fourierft": {"n_frequency": 20},
    "nola": {"r": 2, "basis": 8},
    "loca": {"n_coefficients": 20, "location_share": 0.8},
    "randlora": {"like_lora": 2},
    "codyra": {"rank": 4},
    "full+dct-adamw": {"rank": 4, "weight_decay": 0.01},
    "full+trion": {"rank": 4},
    "full+galore": {"rank": 4, "update_every": 5},
    **dict.fromkeys(("lora", "pissa", "milora", "dora", "ailora", "comp-lora", "sora", "diffora"), SMALL),
    **dict.fromkeys(("adalora", "increlora"), QUICK),
    **dict.fromkeys(("lora+ggpo", "lora+mgpo", "lora+dct-adamw"), SMALL),
}
COMBINED = ["lora+ggpo", "lora+mgpo", "lora+dct-adamw", "full+dct-adamw", "full+galore", "full+trion"]
NAMES = [*(name for name, options in ADAPTERS.items() if not options.forgets), *COMBINED]
STEPS = 12


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    return glue_folder(tmp_path_factory.mktemp("glue"))


def run(model, data, out, name, *, settings=None, **changes):
    given = {"steps": STEPS, "batch_size": 4, "validate_every": 0, "checkpoint_every": 5, "keep_checkpoints": 9, **changes}
    model = load_text_model(model, Target.of(data), max_tokens=16)
    tuning = parse_tuning(name, SETTINGS.get(name, {}) if settings is None else settings)
    targets = ("query", "value") if data.task.kind != "causal-lm" else ("c_attn",)
    return model, finetune(model, data, out, tuning, SupervisedConfig(**given), targets=targets)


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def data(glue):
    return read_data(*named_task("sst2", glue))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_resumes_to_the_same_bytes_and_is_saved_as_it_is(name, bert, data, tmp_path, monkeypatch):
    straight, result = run(bert, data, tmp_path / "straight", name)
    with killed_at(8, monkeypatch):  # after the checkpoint of step 5
        run(bert, data, tmp_path / "again", name)
    resumed, again = run(bert, data, tmp_path / "again", name)
    ours, theirs = tensors(straight), tensors(resumed)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (again.scores, again.trained) == (result.scores, result.trained)
    logs = [(tmp_path / folder / "metrics.jsonl").read_text() for folder in ("straight", "again")]
    assert logs[0] == logs[1]
    if name != "head":
        check_saved(name, bert, data, resumed, again)


def check_saved(name, bert, data, model, result):
    """The folder, on a fresh base, answers as the trained model, and not as the base."""
    batch = model.batch(data.held_out[:5])
    base = AutoModel.from_pretrained(bert, add_pooling_layer=False).eval()
    bare = base(**batch.inputs).last_hidden_state
    network = (
        AutoModel.from_pretrained(result.adapter) if name.startswith("full") else PeftModel.from_pretrained(base, result.adapter)
    )
    found = network.eval()(**batch.inputs).last_hidden_state
    assert_close(found, model.eval().network(**batch.inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert (bare - found).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["increlora", "adalora", "codyra", "lora"])
def test_the_best_step_is_one_where_the_method_has_its_final_shape(name, bert, data, tmp_path):
    settings = {**SETTINGS[name], "learning_rate": 1e-6}  # nothing is learnt: the first step that may be kept is the best
    model, result = run(bert, data, tmp_path / "run", name, settings=settings, validate_every=1)
    lines = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    assert all("val_accuracy" in line for line in lines)
    assert {"increlora": 2, "adalora": 9, "codyra": STEPS, "lora": 1}[name] <= result.best_step
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{result.best_step:06d}" / "adapter.safetensors")
    assert all(torch.equal(model.state_dict()[key], saved[key]) for key in saved)


def test_a_run_killed_before_its_record_is_finished(bert, data, tmp_path, monkeypatch):
    finish = Run.finish
    monkeypatch.setattr(Run, "finish", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(bert, data, tmp_path / "run", "lora", steps=2)
    monkeypatch.setattr(Run, "finish", finish)
    _, result = run(bert, data, tmp_path / "run", "lora", steps=2)
    assert Path(result.adapter).is_dir()


def test_the_head_is_saved_with_its_meaning(bert, data, tmp_path):
    model, _ = run(bert, data, tmp_path / "run", "lora", steps=3)
    head = load_file(tmp_path / "run" / "head.safetensors")
    assert torch.equal(head["weight"], model.head.weight)
    assert json.loads((tmp_path / "run" / "head.json").read_text())["labels"] == ["0", "1"]


def test_it_learns(bert, data, tmp_path):
    _, result = run(bert, data, tmp_path / "run", "full", settings={"learning_rate": 3e-3}, steps=120, validate_every=30)
    lines = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    assert result.scores["accuracy"] > 0.9
    best = max(line["val_accuracy"] for line in lines if "val_accuracy" in line)
    assert lines[result.best_step - 1]["val_accuracy"] == best == result.scores["accuracy"]


def test_a_base_weight_that_is_not_trained_keeps_its_bytes(bert, data, tmp_path):
    model, _ = run(bert, data, tmp_path / "run", "lora", steps=4)
    base = AutoModel.from_pretrained(bert).state_dict()
    now = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in model.network.state_dict().items()}
    assert all(torch.equal(now[name], base[name]) for name in base if name in now)


def test_regression_reads_pairs_and_standardizes(bert, glue, tmp_path):
    data = read_data(*named_task("stsb", glue))
    model, result = run(bert, data, tmp_path / "run", "lora", steps=3)
    assert set(result.scores) == {"loss", "spearman", "pearson"}
    standard = model.target.tensor(data.train).double()
    assert_close(standard.mean(), torch.tensor(0.0).double(), atol=1e-6, rtol=0)
    assert_close(standard.std(correction=0), torch.tensor(1.0).double(), atol=1e-6, rtol=0)


def test_pairs_apart_see_each_text_alone(bert, glue):
    data = read_data(*named_task("mrpc", glue))
    model = load_text_model(bert, Target.of(data), pairs="apart", max_tokens=16).eval()
    batch = model.batch(data.train[:3])
    u, v = model.encode([row.texts[0] for row in data.train[:3]]), model.encode([row.texts[1] for row in data.train[:3]])
    assert_close(model(batch), model.head(torch.cat([u, v, (u - v).abs(), u * v], dim=1)), rtol=1e-5, atol=1e-5)


def test_a_causal_model_learns_the_answer_only(tmp_path):
    rows = [{"ask": "the road was", "say": row["sentence"]} for row in single(30)]
    task = TextTask(name="lines", kind="causal-lm", texts=("ask", "say"))
    data = read_data(task, write_jsonl(tmp_path / "lines.jsonl", rows), share=0.2)
    folder = tiny_gpt(tmp_path / "gpt")
    model, result = run(folder, data, tmp_path / "run", "lora", settings={"rank": 2}, steps=4)
    batch = model.batch(data.train[:4])
    words = batch.inputs["attention_mask"].sum(1)
    assert batch.weight == int((words - 3).sum())  # three words of the prompt are only read
    assert set(result.scores) == {"loss"}
    assert not (tmp_path / "run" / "head.safetensors").exists()
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), result.adapter).eval()
    assert_close(peft(**batch.inputs).logits, model.eval()(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("task", "pairs"), [("sst2", None), ("mrpc", "apart"), ("mrpc", "together")])
def test_texts_that_are_longer_than_what_is_read_are_counted(bert, glue, task, pairs):
    data = read_data(*named_task(task, glue))
    short, long = (load_text_model(bert, Target.of(data), pairs=pairs, max_tokens=tokens) for tokens in (4, 128))
    lengths = [len(short.tokenizer(text)["input_ids"]) for row in data.train for text in row.texts]
    assert min(lengths) > 4
    assert (short.cut(data.train), long.cut(data.train)) == (len(data.train), 0)


def test_a_run_says_how_many_texts_are_cut(bert, data, tmp_path, capsys):
    model = load_text_model(bert, Target.of(data), max_tokens=4)
    finetune(model, data, tmp_path / "run", parse_tuning("lora", {"rank": 1}), SupervisedConfig(steps=1, validate_every=0))
    said = " ".join(capsys.readouterr().err.split())
    count = len(data.train) + len(data.held_out)
    assert f"{count} of {count} texts are longer than the tokens that the model reads: their ends are cut off" in said


def test_accumulation_changes_nothing_but_rounding(bert, data, tmp_path):
    whole, _ = run(tiny_bert(tmp_path / "still", dropout=0.0), data, tmp_path / "whole", "lora", steps=3)
    parts, _ = run(str(tmp_path / "still"), data, tmp_path / "parts", "lora", steps=3, memory=MemoryConfig(accumulation=2))
    for name, tensor in tensors(whole).items():
        assert_close(tensor, tensors(parts)[name], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_not_run_again(bert, data, tmp_path, monkeypatch):
    _, result = run(bert, data, tmp_path / "run", "lora", steps=2)
    monkeypatch.setattr(TrainingLoop, "run", None)
    assert run(bert, data, tmp_path / "run", "lora", steps=2)[1] == result


def test_another_recipe_does_not_overwrite(bert, data, tmp_path):
    run(bert, data, tmp_path / "run", "lora", steps=2)
    with pytest.raises(UserError, match=r"was made with another recipe: .* was .* and is now .*choose another output folder"):
        run(bert, data, tmp_path / "run", "lora", steps=3)


def test_a_loss_that_is_no_number_stops_the_run(bert, data, tmp_path):
    with pytest.raises(UserError, match=r"The loss and gradient of step \d+ must be finite, got .* Lower the learning rate"):
        run(bert, data, tmp_path / "run", "full", settings={"learning_rate": 1e30}, steps=9, max_grad_norm=0)


def test_targets_that_match_nothing_are_answered_with_those_there_are(bert, data, tmp_path):
    model = load_text_model(bert, Target.of(data))
    with pytest.raises(
        UserError, match=r"--targets must name modules of the model, got 'to_q'\. Its linear modules: dense, key, query"
    ):
        finetune(model, data, tmp_path / "run", parse_tuning("lora"), SupervisedConfig(steps=2), targets=("to_q",))


def test_the_command_prints_its_result(bert, glue, tmp_path):
    command = ["finetune", "--model", bert, "--task", "sst2", "--data", str(glue), "--adapter", "lora", "--set", "rank=2"]
    done = CliRunner().invoke(build(), [*command, "--steps", "6", "--checkpoint-every", "2", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert Path(printed["adapter"]).is_dir()
