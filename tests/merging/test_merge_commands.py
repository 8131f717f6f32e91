"""``valign merge`` and ``valign adapter``: parse, call, print, refuse."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from expert_data import deltas, random_factors
from torch.testing import assert_close
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import adapter as adapter_commands
from valign.cli import merge as merge_commands
from valign.merging import merge_sum
from valign.models.files.adapter_files import LoraFactors, open_adapter, save_adapter


def run(app, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def merge(*arguments):
    return run(merge_commands.app, *arguments)


@pytest.fixture
def folders(three):
    return [expert.file.folder for expert in three]


def test_sum_with_names_and_weights(folders, three, tmp_path):
    result = merge("sum", f"first={folders[0]}", folders[1], folders[2], "--weight", "first=-0.5", "-o", tmp_path / "out")
    summary = json.loads(result.stdout)
    assert summary["adapter"] == str(tmp_path / "out")
    assert (summary["modules"], summary["ranks"]) == (3, [9, 9])
    opened = open_adapter(tmp_path / "out")
    assert [(s["name"], s["weight"]) for s in opened.metadata["sources"]] == [("first", -0.5), ("shocking", 1.0), ("violence", 1.0)]
    expected = deltas(merge_sum(merge_commands.parse_experts([str(f) for f in folders], ["hate=-0.5"])))
    for module, lora in opened.items():
        assert_close(lora.delta(), expected[module])


@pytest.mark.parametrize(
    "arguments",
    [
        ("mean",),
        ("ties", "--density", "0.5", "--normalize", "count", "--rank", "2"),
        ("dare-ties", "--density", "0.5", "--seed", "3"),
        ("best-single", "--score", "hate=0.3", "--score", "shocking=0.1", "--score", "violence=0.2"),
    ],
)
def test_every_command_writes_a_merge_once(arguments, folders, tmp_path):
    name, *options = arguments
    first = json.loads(merge(name, *folders, "-o", tmp_path / "out", *options).stdout)
    assert first["modules"] == 3
    assert open_adapter(tmp_path / "out").metadata["merge_method"] == name
    before = (tmp_path / "out" / "valign.json").stat().st_mtime_ns
    assert json.loads(merge(name, *folders, "-o", tmp_path / "out", *options).stdout) == first  # done already
    assert (tmp_path / "out" / "valign.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made with another"):
        merge(name, *folders[::-1], "-o", tmp_path / "out", "--weight", "hate=2", *options)


def test_plan_compares_and_writes_nothing(folders, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = merge("plan", *folders).stdout
    assert "3 modules match" in text
    assert "cosine" in text
    figures = json.loads(merge("plan", *folders, "--rank", "9", "--json").stdout)
    assert figures["experts"] == ["hate", "shocking", "violence"]
    assert figures["error"] < 1e-6
    assert sorted(tmp_path.rglob("*")) == before


def test_co_merge_on_a_pipeline(tiny_sd, tmp_path):
    from valign.data.prompts.pairs import PromptPair, write_pairs
    from valign.models.diffusion.loading import load_model

    model = load_model(str(tiny_sd), device="cpu")
    shapes = {name: layer.weight.shape for name, layer in model.denoiser.named_modules() if name.endswith(("to_q", "to_v"))}
    for name, seed in (("hate", 0), ("violence", 1)):
        metadata = {"base_fingerprint": model.fingerprint(), "category": name}
        save_adapter(tmp_path / name / "adapter", random_factors(shapes, rank=2, seed=seed), metadata=metadata)
    words = ("red", "blue", "photo")
    pairs = [
        PromptPair(f"{name}{i}", f"a {name} {word}", f"a {word}", (name,), held_out=word == "photo")
        for name in ("hate", "violence", "sexual")
        for i, word in enumerate(words)
    ]
    write_pairs(tmp_path / "data" / "prompts" / "pairs.parquet", pairs)
    asked = ("--model", tiny_sd, "--data", tmp_path / "data", "--steps", 2, "--states", 1, "--device", "cpu")
    result = merge("co-merge", tmp_path / "hate", tmp_path / "violence", "-o", tmp_path / "out", *asked)
    assert json.loads(result.stdout[result.stdout.index("{") :])["modules"] == len(shapes)
    votes = json.loads((tmp_path / "out" / "votes.json").read_text())
    assert votes["record"]["prompts"] == {"hate": 2, "violence": 2}  # neither "sexual", nor held-out concepts
    for name in ("selection.json", "selection.png", "votes.safetensors", "merge_config.yml", "README.md", "run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    pipe = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.load_lora_weights(tmp_path / "out")  # finds the adapter beside the votes
    # another granularity from the same votes, without the model
    again = (tmp_path / "hate", tmp_path / "violence", "-o", tmp_path / "units", "--votes", tmp_path / "out")
    merge("co-merge", *again, "--granularity", "rank_unit")
    assert {lora.rank for _, lora in open_adapter(tmp_path / "units").items()} == {2}


def test_regmean_on_a_pipeline(tiny_sd, tmp_path):
    from valign.data.prompts.pairs import PromptPair, write_pairs
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.text_states import text_readers

    model = load_model(str(tiny_sd), device="cpu")
    shapes = {name: tuple(layer.weight.shape) for name, layer in text_readers(model).items()}
    for name, seed in (("hate", 0), ("violence", 1)):
        metadata = {"base_fingerprint": model.fingerprint(), "category": name}
        save_adapter(tmp_path / name / "adapter", random_factors(shapes, rank=2, seed=seed), metadata=metadata)
    words = ("red", "blue", "photo")
    pairs = [
        PromptPair(f"{name}{i}", f"a {name} {word}", f"a {word}", (name,))
        for name in ("hate", "violence")
        for i, word in enumerate(words)
    ]
    write_pairs(tmp_path / "data" / "prompts" / "pairs.parquet", pairs)
    experts = (tmp_path / "hate", tmp_path / "violence")
    asked = ("--model", tiny_sd, "--data", tmp_path / "data", "--device", "cpu")
    summary = json.loads(merge("regmean", *experts, "-o", tmp_path / "out", "--weight", "hate=1.5", *asked).stdout)
    assert (summary["modules"], summary["ranks"]) == (len(shapes), [4, 4])
    assert 1 < summary["condition_worst"] < 1e12
    record = open_adapter(tmp_path / "out").metadata
    assert record["merge_method"] == "regmean"
    assert (record["options"]["lam"], record["options"]["captions"]) == (1.0, 300)
    DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).load_lora_weights(tmp_path / "out")
    (tmp_path / "benign.csv").write_text("prompt\na green photo\na woman\n")
    more = ("--benign", tmp_path / "benign.csv", "--edit", "shapes")
    edited = json.loads(merge("regmean", *experts, "-o", tmp_path / "edited", *asked, *more).stdout)
    assert edited["ranks"] == [4 + 14, 4 + 14]  # one state for each of the policy's fourteen concepts that training may know
    (tmp_path / "unsafe.csv").write_text("prompt,label,categories\nred,1,hate\nblue,1,violence\n")
    with pytest.raises(UserError, match="needs --benign FILE, captions on which the merge leaves the model as it is"):
        merge("regmean", *experts, "-o", tmp_path / "x", "--model", tiny_sd, "--prompts", tmp_path / "unsafe.csv")
    with pytest.raises(UserError, match="regmean needs --model, the base model of the experts"):
        merge("regmean", *experts, "-o", tmp_path / "x", "--data", tmp_path / "data")
    (tmp_path / "half.csv").write_text("prompt,label,categories\nred,1,hate\n")
    beside = ("--model", tiny_sd, "--benign", tmp_path / "benign.csv", "--device", "cpu", "-o", tmp_path / "x")
    with pytest.raises(UserError, match="violence must have unsafe prompts of its category, got only those of hate"):
        merge("regmean", *experts, *beside, "--prompts", tmp_path / "half.csv")
    with pytest.raises(UserError, match="must be well conditioned, got the condition number"):  # while it streams
        merge("regmean", *experts, *beside, "--prompts", tmp_path / "unsafe.csv", "--lam", "0", "--ridge", "0")
    assert not (tmp_path / "x").exists()


def test_prompts_of_other_columns_are_looked_at(folders, tmp_path):
    (tmp_path / "own.tsv").write_text("caption\tkind\na burglar\tviolence\na mob\thate\nblood\tshocking\n")
    asked = ("co-merge", *folders, "-o", tmp_path / "out", "--prompts", tmp_path / "own.tsv")
    with pytest.raises(UserError, match="prompt"):
        merge(*asked)
    with pytest.raises(UserError, match="co-merge needs --model"):  # the prompts are read before
        merge(*asked, "--column", "prompt=caption", "--column", "category=kind", "--fill", "label=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sum", "A", "A"), "must have different names, got hate twice"),
        (("sum", "A", "--weight", "nobody=1"), "--weight must name one of hate; got nobody"),
        (("sum", "A", "--weight", "hate"), "--weight must be NAME=NUMBER"),
        (("sum", "nowhere"), "nowhere does not exist"),
        (("co-merge", "A"), "needs one of --data FOLDER and --prompts FILE"),
        (("best-single", "A", "--score", "hate=x"), "--score must be NAME=NUMBER"),
        (("ties", "A", "--density", "2"), r"--density must be in \(0, 1"),
    ],
)
def test_mistakes_are_named(arguments, message, folders, tmp_path):
    arguments = [folders[0] if argument == "A" else argument for argument in arguments]
    with pytest.raises(ValueError, match=message):
        merge(*arguments, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "valign.json").exists()


def test_never_over_an_input_or_somebody_elses_folder(folders, tmp_path):
    with pytest.raises(UserError, match="must be another folder than the expert hate"):
        merge("sum", folders[0], "-o", folders[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not a merge"):
        merge("sum", folders[0], "-o", tmp_path / "mine")


def test_an_unknown_choice_or_option_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"--normalize.*median"):
        merge("ties", folders[0], "-o", tmp_path / "out", "--normalize", "median")
    with pytest.raises(UserError, match="--set must name options of the command, got sparsity"):
        merge("ties", folders[0], "-o", tmp_path / "out", "--set", "sparsity=0.2")
    with pytest.raises(UserError, match="No such command: task-arithmetic"):
        merge("task-arithmetic", folders[0], "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_may_be_typed_set_or_read_from_a_file(folders, tmp_path):
    (tmp_path / "ties.yaml").write_text("density: 0.5\nnormalize: count\n")
    ways = {
        "typed": ("--density", "0.5", "--normalize", "count"),
        "set": ("--set", "density=0.5", "--set", "normalize=count"),
        "file": ("--config", tmp_path / "ties.yaml"),
    }
    for name, options in ways.items():
        merge("ties", *folders, "-o", tmp_path / name, *options)
    made = {(tmp_path / name / "merge_config.yml").read_text() for name in ways}
    assert len(made) == 1
    assert "normalize: count" in made.pop()


def test_show_says_what_and_where_from(folders, tmp_path):
    merge("mean", *folders, "-o", tmp_path / "out", "--weight", "hate=0.5")
    text = run(adapter_commands.app, "show", tmp_path / "out").stdout
    assert "hate x 0.5" in text
    assert "mean" in text
    facts = json.loads(run(adapter_commands.app, "show", tmp_path / "out", "--json", "--norms").stdout)
    dense = [lora.delta().norm() for _, lora in open_adapter(tmp_path / "out").items()]
    assert facts["norm"] == pytest.approx(float(torch.stack(dense).norm()), rel=1e-5)
    assert facts["ranks"] == [9]
    assert facts["by_module"]["mid_block.to_v"]["shape"] == [6, 9]


def test_export_and_import(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_adapter(tmp_path / "a", {name: LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 1.0)}, metadata={"category": "hate"})
    app = adapter_commands.app
    run(app, "export", tmp_path / "a", tmp_path / "a.safetensors", "--format", "kohya")
    run(app, "import", tmp_path / "a.safetensors", tmp_path / "b")
    assert open_adapter(tmp_path / "b").fingerprint() == open_adapter(tmp_path / "a").fingerprint()
    with pytest.raises(UserError, match="--force"):
        run(app, "export", tmp_path / "a", tmp_path / "a.safetensors")
    run(app, "export", tmp_path / "a", tmp_path / "a.safetensors", "--force")
    with pytest.raises(UserError, match="exists"):
        run(app, "import", tmp_path / "a.safetensors", tmp_path / "b")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        run(app, "export", tmp_path / "a", tmp_path / "a.ckpt")
