"""Every objective, on every adapter, in a real training: resumed to the same bytes, refused where it makes no sense."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from dying import killed_at
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from chat_data import chat, chat_files, refusals, tiny_chat
from valign.adapters import ADAPTERS
from valign.checks import UserError
from valign.cli.root import build
from valign.data.chats import Conversation, read_chat_pairs, read_chats
from valign.data.tasks.base import Task, TaskData
from valign.files import read_json
from valign.memory import MemoryConfig
from valign.models.files.adapter_base import chat_record
from valign.models.files.adapter_files import public_record
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat
from valign.objectives import PRESERVING, AnswerTokens, token_kl, token_mean
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preserving import PreserveData, parse_preserving
from valign.training.tasks.supervised import SupervisedConfig, finetune

STEPS = 6
BESIDE = {  # what each objective reads
    **dict.fromkeys(("agl", "kl", "safe-align"), ("calibration",)),
    "safety-recovery": ("calibration", "pairs"),
    **dict.fromkeys(("ihl", "npo", "ascent"), ("forget",)),
    **dict.fromkeys(("star-dss", "static-shaping"), ("guard",)),
    "constrained-sft": (),
}
LORA = {"rank": 2}
ADAPTER_OPTIONS = {
    "lora-sb": {"rank": 4},
    "fourierft": {"n_frequency": 20},
    "nola": {"r": 2, "basis": 8},
    "loca": {"n_coefficients": 20, "location_share": 0.8},
    "randlora": {"like_lora": 2},
    "codyra": {"rank": 4},
    "full": {},
}


def half_safe(partials):
    """A guard that doubts long answers."""
    return torch.tensor([1.0 if len(text.split()) < 3 else 0.25 for _, text in partials])


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return chat_files(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="session")
def data(files):
    rows = read_chats(files / "skills.jsonl")
    return TaskData(Task(name="chat", kind="chat"), tuple(rows[:32]), tuple(rows[32:]))


@pytest.fixture(scope="session")
def beside(files):
    known = {
        "calibration": tuple(read_chats(files / "refusals.jsonl")),
        "pairs": tuple(read_chat_pairs(files / "pairs.jsonl")),
        "forget": tuple(read_chats(files / "forget.jsonl")),
        "guard": half_safe,
    }

    def given(*parts):
        names = {part for part in parts if part}
        if "pairs" in names:
            return PreserveData(pairs=known["pairs"])  # their safe sides are the calibration
        return PreserveData(**{name: known[name] for name in names})

    return given


def run(llama, data, out, *, adapter="lora", preserve="", beside=None, settings=None, options=None, previews=0, **changes):
    given = {"steps": STEPS, "batch_size": 4, "validate_every": 0, "checkpoint_every": 4, **changes}
    model = ChatTaskModel(load_chat(llama, device="cpu", dtype="float32"), max_tokens=64)
    objectives, _ = parse_preserving(preserve, options)
    tuning = parse_tuning(adapter, ADAPTER_OPTIONS.get(adapter, LORA) if settings is None else settings)
    result = finetune(model, data, out, tuning, SupervisedConfig(**given), preserve=objectives, beside=beside, previews=previews)
    return model, result


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    left, right = tensors(one), tensors(other)
    return sorted(left) == sorted(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_a_setting_without_effect_is_refused():
    with pytest.raises(UserError, match=r"SafeAlign\.lambda2 has no effect unless strategy is 'B', got strategy 'A'"):
        parse_preserving("safe-align", {"lambda2": 0.3})
    made, _ = parse_preserving("safe-align", {"lambda2": 0.3, "strategy": "B"})
    assert made["safe-align"].lambda2 == 0.3


def test_every_row_of_the_table_is_run_here():
    assert sorted(BESIDE) == sorted(PRESERVING)


@pytest.fixture(scope="module")
def plain(llama, data, tmp_path_factory):
    """A training without any objective, and its folder."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return run(llama, data, out)[0], out


@pytest.mark.parametrize("name", PRESERVING)
def test_every_objective_trains_and_resumes_to_the_same_bytes(name, llama, data, beside, plain, tmp_path, monkeypatch):
    rows = beside(*BESIDE[name])
    straight, result = run(llama, data, tmp_path / "straight", preserve=name, beside=rows)
    with killed_at(5, monkeypatch):  # after the checkpoint of step 4
        run(llama, data, tmp_path / "again", preserve=name, beside=rows)
    resumed, again = run(llama, data, tmp_path / "again", preserve=name, beside=rows)
    assert same(straight, resumed)
    assert again.scores == result.scores
    assert (tmp_path / "straight" / "metrics.jsonl").read_bytes() == (tmp_path / "again" / "metrics.jsonl").read_bytes()
    assert not same(straight, plain[0])


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "head"])
@pytest.mark.parametrize("preserve", ["agl+kl"])
def test_penalties_go_with_every_adapter_and_start_at_zero(name, preserve, llama, data, beside, tmp_path):
    rows = beside("calibration")
    if ADAPTERS[name].forgets:
        rows, preserve = replace(beside("forget"), calibration=rows.calibration), f"{preserve}+ihl"
    has_rank = "rank" in {field.name for field in fields(ADAPTERS[name])}
    options = ADAPTER_OPTIONS.get(name, LORA if has_rank else {})
    run(llama, data, tmp_path / "run", adapter=name, preserve=preserve, beside=rows, settings=options)
    log = log_of(tmp_path / "run")
    first = log[0]
    if name != "lora-sb":  # its start has made a step of training already
        assert abs(first["kl"]) < 1e-6
    assert abs(first.get("agl", 0.0)) < 1e-9
    assert log[-1]["agl"] > 0
    assert log[-1]["kl"] > 0


def test_with_all_weights_zero_the_training_is_the_plain_one_to_the_last_bit(llama, data, beside, plain, tmp_path):
    off = {"lambda_A": 0.0, "lambda_T": 0.0, "lambda_NC": 0.0}
    agl, _ = run(llama, data, tmp_path / "agl", preserve="agl", beside=beside("calibration"), options=off)
    assert same(plain[0], agl)


def test_agl_and_kl_hold_the_calibration_answers(llama, data, beside, tmp_path):
    rows, start = beside("calibration"), load_chat(llama, device="cpu", dtype="float32")

    def drift(model):
        batch = model.batch(rows.calibration)
        with torch.no_grad():
            before, after = (
                AnswerTokens.of(one(**batch.inputs).logits, batch.target, vocabulary=True)
                for one in (start.model, model.eval().network)
            )
        return token_mean(token_kl(before.words, after.words), before.mask).item()

    settings = {"rank": 2, "learning_rate": 0.02}
    found = {}
    for name, options in (("", {}), ("agl", {"lambda_A": 5.0, "lambda_T": 5.0}), ("kl", {"weight": 20.0})):
        given = {"preserve": name, "beside": rows if name else None, "options": options}
        model, _ = run(llama, data, tmp_path / f"run-{name}", settings=settings, steps=30, **given)
        found[name] = drift(model)
    assert found["agl"] < 0.5 * found[""]
    assert found["kl"] < 0.5 * found[""]


def test_accumulation_changes_nothing_but_rounding(llama, data, beside, tmp_path):
    for name in ("constrained-sft", "safety-recovery", "star-dss"):
        rows = beside(*BESIDE[name])
        logs = []
        for parts in (1, 3):
            run(llama, data, tmp_path / f"{name}-{parts}", preserve=name, beside=rows, memory=MemoryConfig(accumulation=parts))
            logs.append([line["loss"] for line in log_of(tmp_path / f"{name}-{parts}")])
        assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-4, atol=1e-6)


def test_at_step_zero_constrained_sft_is_plain_and_its_cross_entropy_is_logged(llama, data, plain, tmp_path):
    run(llama, data, tmp_path / "held", preserve="constrained-sft", settings={"rank": 2, "learning_rate": 0.05})
    start, held = log_of(plain[1]), log_of(tmp_path / "held")
    assert held[0]["loss"] == pytest.approx(start[0]["loss"], rel=1e-5)
    assert held[0]["cross_entropy"] == pytest.approx(held[0]["loss"], rel=1e-5)
    assert held[-1]["cross_entropy"] != pytest.approx(held[-1]["loss"], rel=1e-3)


def test_references_are_the_model_before_an_adapter_that_rewrites_it(llama, data, beside, tmp_path):
    run(llama, data, tmp_path / "pissa", adapter="pissa", preserve="npo", beside=beside("forget"))
    assert log_of(tmp_path / "pissa")[0]["npo"] == pytest.approx(20 * 0.6931472, rel=1e-4)  # (2 / 0.1) ln 2


def test_what_is_saved_is_what_was_trained_with_its_template(llama, data, beside, tmp_path):
    model, result = run(llama, data, tmp_path / "run", preserve="agl", beside=beside("calibration"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), result.adapter).eval()
    batch = model.batch(data.held_out)
    assert_close(again(**batch.inputs).logits, model.eval().network(**batch.inputs).logits, rtol=1e-4, atol=1e-4)
    template = AutoTokenizer.from_pretrained(result.adapter).chat_template
    assert template == AutoTokenizer.from_pretrained(llama).chat_template


def test_a_whole_network_is_saved_as_a_model_that_chats(llama, data, tmp_path):
    model, result = run(llama, data, tmp_path / "run", adapter="full", settings={"learning_rate": 1e-2})
    again = load_chat(result.adapter, device="cpu", dtype="float32")
    batch = model.batch(data.held_out)
    assert_close(again.model(**batch.inputs).logits, model.eval().network(**batch.inputs).logits, rtol=1e-4, atol=1e-4)


def test_answers_before_and_after_stand_beside_each_other(llama, data, tmp_path):
    run(llama, data, tmp_path / "run", settings={"rank": 2, "learning_rate": 0.1}, previews=2)
    found = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [entry["messages"][0]["content"] for entry in found] == [row.turns[0][1] for row in data.held_out[:2]]
    assert all(isinstance(entry["before"], str) and isinstance(entry["after"], str) for entry in found)
    assert [entry["before"] for entry in found] != [entry["after"] for entry in found]


MODES = [{"projector": "vector"}, {"projector": "coordinate"}, {"trust": "task_ema"}, {"fisher_labels": "model"}]


@pytest.mark.parametrize("options", MODES)
def test_agls_other_modes_train_and_resume(options, llama, data, beside, tmp_path, monkeypatch):
    settings = {"preserve": "agl", "beside": beside("calibration"), "options": {**options, "lambda_NC": 0.0, "refresh_every": 2}}
    straight, _ = run(llama, data, tmp_path / "straight", **settings)
    with killed_at(5, monkeypatch):
        run(llama, data, tmp_path / "again", **settings)
    resumed, _ = run(llama, data, tmp_path / "again", **settings)
    assert same(straight, resumed)
    assert log_of(tmp_path / "straight")[-1]["agl"] > 0


@pytest.mark.parametrize(
    ("preserve", "parts", "message"),
    [
        ("agl", (), r"--preserve agl must have rows of what is to stay, got none\. Give --calibration"),
        ("ihl", (), r"--preserve ihl must have rows to be unlearned, got none\. Give --forget"),
        ("star-dss", (), r"--preserve star-dss must have a guard that scores answers, got none\. Give --guard"),
        ("constrained-sft", ("calibration",), r"--calibration must go with an objective that reads it, got none"),
        ("agl", ("calibration", "forget"), r"--forget must go with an objective that reads it, got none"),
        ("constrained-sft+star-dss", ("guard",), r"one objective on the training rows, got constrained-sft and star-dss"),
        ("ihl+npo", ("forget",), r"one objective on the forget rows, got ihl and npo"),
        ("ascent+constrained-sft", ("forget",), r"ascent has retain_weight 0, so constrained-sft would have no row"),
        ("safety-recovery+constrained-sft", ("pairs",), r"must not join safety-recovery with constrained-sft"),
        ("safety-recovery", ("calibration",), r"--calibration must hold pairs .* for safety-recovery, got chats with one answer"),
    ],
)
def test_nonsense_is_refused_with_the_reason_before_any_work(preserve, parts, message, llama, data, beside, tmp_path):
    with pytest.raises(UserError, match=message):
        run(llama, data, tmp_path / "run", preserve=preserve, beside=beside(*parts))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_calibration_without_a_refusal_is_refused_unless_its_words_are_named(llama, data, beside, tmp_path):
    rows = PreserveData(calibration=tuple(data.held_out))
    with pytest.raises(UserError, match=r"--calibration must hold refusals, got 0 among 8 answers"):
        run(llama, data, tmp_path / "run", preserve="agl", beside=rows)
    run(llama, data, tmp_path / "run", preserve="agl", beside=replace(rows, refusals=(data.held_out[0].turns[-1][1],)))


def test_adapters_that_forget_and_adapters_of_nothing_are_refused(llama, data, beside, tmp_path):
    with pytest.raises(UserError, match=r"adapter fila must have rows to forget, got none"):
        run(llama, data, tmp_path / "fila", adapter="fila", preserve="agl", beside=beside("calibration"))
    with pytest.raises(UserError, match=r"--preserve must name objectives, known, got 'aql'\. Did you mean 'agl'\? Known: agl, kl"):
        parse_preserving("aql")
    with pytest.raises(UserError, match=r"--preserve must name objectives, each once"):
        parse_preserving("kl+kl")
    with pytest.raises(UserError, match=r"--set beta belongs to agl and constrained-sft"):
        parse_preserving("agl+constrained-sft", {"beta": 1.0})
    assert parse_preserving("agl+kl", {"kl.weight": 2, "rank": 4})[1] == {"rank": 4}


def test_options_change_the_run_and_its_recipe(llama, data, beside, tmp_path):
    rows = beside("calibration")
    run(llama, data, tmp_path / "run", preserve="kl", beside=rows)
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert recipe["preserve"]["objectives"] == {"kl": {"weight": 1.0, "direction": "forward"}}
    with pytest.raises(UserError, match="was made with another recipe"):
        run(llama, data, tmp_path / "run", preserve="kl", beside=rows, options={"weight": 3.0})


def test_chats_that_do_not_fit_are_refused_or_counted_out(llama):
    model = ChatTaskModel(load_chat(llama, device="cpu", dtype="float32"), max_tokens=12)
    files = [*refusals(), chat("say cup twice", "cup cup")]
    rows = [Conversation(tuple((turn["role"], turn["content"]) for turn in row["messages"])) for row in files]
    with pytest.raises(UserError, match=r"row 1 must have at most 12 tokens, got 14 \(12 of 13 are too long\)"):
        model.fitting(rows)
    kept = ChatTaskModel(model.loaded, max_tokens=12, overlong="drop").fitting(rows)
    assert kept == rows[-1:]


def test_the_command_trains_a_chat_model_and_keeps_its_answers(llama, files, tmp_path):
    out = tmp_path / "run"
    given = ["--model", llama, "--task", "chat", "--data", str(files / "skills.jsonl"), "--out", str(out), "--device", "cpu"]
    given += ["--steps", "3", "--batch-size", "4", "--set", "rank=2", "--set", "previews=1"]
    ran = CliRunner().invoke(
        build(),
        ["finetune", *given, "--preserve", "agl+kl", "--set", "agl.lambda_A=1", "--calibration", str(files / "refusals.jsonl")],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0, ran.output
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert recipe["preserve"]["objectives"]["agl"]["lambda_A"] == 1.0
    assert len(json.loads((out / "answers.json").read_text())) == 1
    assert (out / "adapter" / "chat_template.jinja").exists()
    assert read_json(out / "adapter" / "valign.json") == public_record(chat_record(Path(llama)))
    ran = CliRunner().invoke(build(), ["finetune", *given, "--calibration", str(files / "refusals.jsonl")])
    assert "Rows to keep or to forget must go with an objective" in str(ran.exception)
