"""Folders in, a folder out: whole models in shards, adapters, what is refused, and nothing half written."""

import json

import pytest
import torch
from realign_data import factors, model, peft_adapter, plus, tensors
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from valign.checks import UserError
from valign.files import read_json, write_json
from valign.merging.realign import EnchTable, Resta, SafeLora, open_realignment, realign
from valign.models.files.adapter_files import open_adapter
from valign.models.files.weight_files import open_weights

MODULES = {"a": (6, 4), "b": (5, 7)}


def weights(folder):
    opened = open_weights(folder)
    return {name: opened.read(name) for name in opened.shapes}


def run(method, base, aligned, finetuned, out, *, name="resta", form="auto", rank=None, shard_size=10**9, **opening):
    opened = open_realignment(base, aligned, finetuned, **opening)
    return realign(method, opened, out, name=name, form=form, rank=rank, shard_size=shard_size)


def delta(pair, scale=1.0):
    down, up = pair
    return scale * up @ down


# ---- whole models ----------------------------------------------------------------------------------------------------


def test_whole_models_in_shards_equal_the_formula(family, tmp_path):
    found = run(Resta(strength=0.5), family.base, family.aligned, [family.tuned], tmp_path / "out", shard_size=200)
    assert len(found["files"]) > 2
    assert set(read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"].values()) == set(found["files"])
    made = weights(tmp_path / "out")
    w = family.weights
    for name in w["base"]:
        assert_close(made[name], w["tuned"][name] + 0.5 * (w["aligned"][name] - w["base"][name]))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    gap = torch.cat([(made[name] - w["tuned"][name]).flatten() for name in made]).norm()
    task = torch.cat([(w["tuned"][name] - w["aligned"][name]).flatten() for name in made]).norm()
    assert found["moved"] == pytest.approx(float(gap / task), rel=1e-4)
    along = sum(float(((made[name] - w["aligned"][name]) * (w["tuned"][name] - w["aligned"][name])).sum()) for name in made)
    assert found["kept"] == pytest.approx(along / float(task) ** 2, rel=1e-4)


def test_one_shard_many_shards_and_sharded_inputs_give_the_same_weights(family, tmp_path):
    sharded = model(tmp_path / "sharded", family.weights["tuned"], shards=3)
    run(Resta(), family.base, family.aligned, [family.tuned], tmp_path / "one")
    run(Resta(), family.base, family.aligned, [sharded], tmp_path / "many", shard_size=300)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_strength_0_gives_the_fine_tuned_model_back(family, tmp_path):
    for name, method in (("resta", Resta(strength=0)), ("enchtable", EnchTable(strength=0)), ("safe-lora", SafeLora(strength=0))):
        run(method, family.base, family.aligned, [family.tuned], tmp_path / name, name=name)
        made = weights(tmp_path / name)
        assert all(torch.allclose(made[one], family.weights["tuned"][one], rtol=0, atol=1e-6) for one in made)


def test_several_models_are_fused(family, tmp_path):
    both = [family.tuned, family.other]
    run(Resta(strength=0.5, fuse="mean"), family.base, family.aligned, both, tmp_path / "out")
    made, w = weights(tmp_path / "out"), family.weights
    for name in made:
        mean = (w["tuned"][name] + w["other"][name]) / 2
        assert_close(made[name], mean + 0.5 * (w["aligned"][name] - w["base"][name]))
    with pytest.raises(UserError, match="must know how 2 fine-tuned models become one"):
        run(Resta(), family.base, family.aligned, both, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_start_from_the_base_takes_the_task_against_it(family, tmp_path):
    tuned = model(tmp_path / "from-base", plus(family.weights["base"], tensors(2, scale=0.2)))
    run(EnchTable(strength=0.3, fine=False), family.base, family.aligned, [tuned], tmp_path / "out", name="enchtable", start="base")
    made, w = weights(tmp_path / "out"), family.weights
    task = {name: weights(tuned)[name] - w["base"][name] for name in made}
    safety = {name: w["aligned"][name] - w["base"][name] for name in made}
    norm = lambda one: torch.cat([tensor.flatten() for tensor in one.values()]).norm()  # noqa: E731
    alpha = 0.3 * norm(task) / norm(safety)
    for name in made:
        assert_close(made[name], w["base"][name] + task[name] + alpha * safety[name], rtol=1e-4, atol=1e-5)


def test_a_stopped_call_goes_on_from_its_shards_and_a_finished_one_is_only_read(family, tmp_path, monkeypatch):
    whole = run(Resta(), family.base, family.aligned, [family.tuned], tmp_path / "whole", shard_size=200)
    opened, asked = open_realignment(family.base, family.aligned, [family.tuned]), []
    plain = Resta._change

    def counted(self, models, at):
        asked.append(at.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(self, models, at)

    monkeypatch.setattr(Resta, "_change", counted)
    with pytest.raises(KeyboardInterrupt):
        realign(Resta(), opened, tmp_path / "out", name="resta", shard_size=200)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Resta, "_change", lambda self, models, at: (asked.append(at.name), plain(self, models, at))[1])
    again = realign(Resta(), opened, tmp_path / "out", name="resta", shard_size=200)
    assert again == whole
    assert len(asked) < 3 + len(family.weights["base"])  # the first shard was not made again
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "out").rglob(".*"))
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert realign(Resta(), opened, tmp_path / "out", name="resta", shard_size=200) == whole
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made with another recipe"):
        realign(Resta(strength=0.1), opened, tmp_path / "out", name="resta", shard_size=200)


def test_a_pipelines_unet_is_realigned_and_the_rest_copied(family, tmp_path):
    def pipeline(name, tensors):
        folder = model(tmp_path / name / "unet", tensors)
        (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
        write_json(tmp_path / name / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
        (tmp_path / name / "vae").mkdir()
        save_file({"x": torch.ones(2)}, tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")
        return tmp_path / name

    folders = [pipeline(f"pipe-{name}", tensors) for name, tensors in family.weights.items()]
    run(Resta(), *folders[:2], [folders[2]], tmp_path / "out")
    made = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    w = family.weights
    assert_close(made["conv.weight"], w["tuned"]["conv.weight"] + 0.5 * (w["aligned"]["conv.weight"] - w["base"]["conv.weight"]))
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "out" / "model_index.json").exists()


def test_half_precision_integers_and_tied_weights(family, tmp_path):
    places = {"position_ids": torch.arange(5)}
    made = {}
    for name, known in family.weights.items():
        half = {key: tensor.half() for key, tensor in known.items()} | places
        made[name] = model(
            tmp_path / f"{name}-half", half | {"lm_head.weight": half["embed_tokens.weight"].clone()}, tie_word_embeddings=True
        )
    run(Resta(), made["base"], made["aligned"], [made["tuned"]], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in found  # once, under the name of the input embeddings
    assert torch.equal(found["position_ids"], places["position_ids"])
    assert found["a.weight"].dtype == torch.float16
    w = {name: weights(folder)["a.weight"].float() for name, folder in made.items()}
    assert torch.equal(found["a.weight"], (w["tuned"] + 0.5 * (w["aligned"] - w["base"])).half())


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_a_safety_adapter_and_adapters_that_go_on_from_it_stay_low_rank(tmp_path):
    safe, tuned = factors(0, MODULES), factors(1, MODULES)
    peft_adapter(tmp_path / "safe", safe, alpha=4)
    peft_adapter(tmp_path / "tuned", tuned, alpha=4)
    found = run(Resta(strength=0.5), "any/base", tmp_path / "safe", [tmp_path / "tuned"], tmp_path / "out")
    assert found["form"] == "adapter"
    assert found["ranks"] == [4, 4]
    made = open_adapter(tmp_path / "out", anywhere=True)
    for module in MODULES:
        assert_close(made.factors(module).delta(), 2 * delta(tuned[module]) + 0.5 * 2 * delta(safe[module]), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert read_json(tmp_path / "out" / "realign.json")["base"] == "any/base"


def test_the_written_adapter_loads_with_peft_and_does_what_it_says(tmp_path):
    from peft import PeftModel

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(7, 5)

    safe, tuned = factors(0, MODULES), factors(1, MODULES)
    peft_adapter(tmp_path / "safe", safe)
    peft_adapter(tmp_path / "tuned", tuned)
    run(Resta(strength=0.5), "base", tmp_path / "safe", [tmp_path / "tuned"], tmp_path / "out")
    net, x = Net(), torch.randn(3, 4)
    before = net.a(x)
    adapted = PeftModel.from_pretrained(net, tmp_path / "out")
    change = delta(tuned["a"]) + 0.5 * delta(safe["a"])
    assert_close(adapted.base_model.model.a(x), before + x @ change.T, rtol=1e-4, atol=1e-4)


def test_adapters_of_a_whole_aligned_model(family, tmp_path):
    tuned = factors(1, MODULES)
    peft_adapter(tmp_path / "adapter", tuned)
    arguments = (family.base, family.aligned, [tmp_path / "adapter"])
    w = family.weights
    projected = run(SafeLora(strength=1.0), *arguments, tmp_path / "projected", name="safe-lora")
    assert projected["form"] == "adapter"  # C B A has the rank of B A
    v = w["aligned"]["a.weight"] - w["base"]["a.weight"]
    made = open_adapter(tmp_path / "projected", anywhere=True)
    assert_close(made.factors("a").delta(), v @ v.T @ delta(tuned["a"]) / v.norm(), rtol=1e-4, atol=1e-4)
    whole = run(Resta(strength=0.5), *arguments, tmp_path / "whole")
    assert whole["form"] == "model"  # the safety vector is dense, and changes more than the adapter can
    found = weights(tmp_path / "whole")
    for name in found:
        change = delta(tuned[name[0]]) if name in ("a.weight", "b.weight") else 0
        assert_close(found[name], w["aligned"][name] + change + 0.5 * (w["aligned"][name] - w["base"][name]), rtol=1e-4, atol=1e-4)
    cut = run(Resta(strength=0.5), *arguments, tmp_path / "cut", rank=3)
    assert cut["form"] == "adapter"
    assert 0 < cut["error_worst"] < 1
    outside = [name for name in w["base"] if name not in ("a.weight", "b.weight")]
    energy = lambda names: sum(float((w["aligned"][n] - w["base"][n]).square().sum()) for n in names)  # noqa: E731
    assert cut["safety_outside"] == pytest.approx(energy(outside) / energy(w["base"]), rel=1e-4)
    with pytest.raises(UserError, match="An adapter must be low-rank, got a dense safety vector"):
        run(Resta(strength=0.5), *arguments, tmp_path / "never", form="adapter")


def test_a_safety_adapter_on_a_base_with_whole_fine_tuned_models(family, tmp_path):
    safe = factors(0, MODULES)
    peft_adapter(tmp_path / "safe", safe)
    w = family.weights
    run(Resta(strength=0.5), family.base, tmp_path / "safe", [family.tuned], tmp_path / "out")
    made = weights(tmp_path / "out")
    assert_close(made["a.weight"], w["tuned"]["a.weight"] + 0.5 * delta(safe["a"]), rtol=1e-4, atol=1e-5)
    assert_close(made["norm.weight"], w["tuned"]["norm.weight"])


# ---- what is refused -------------------------------------------------------------------------------------------------


def other(family, tmp_path, change, name="odd"):
    tensors = {key: tensor.clone() for key, tensor in family.weights["tuned"].items()}
    change(tensors)
    return model(tmp_path / name, tensors)


def test_refuses_other_keys_shapes_and_values_before_it_writes(family, tmp_path):
    def check(finetuned, message, **opening):
        with pytest.raises(UserError, match=message):
            run(Resta(), family.base, family.aligned, [finetuned], tmp_path / "out", **opening)
        assert not list(tmp_path.glob("*out*"))
        assert not list(tmp_path.glob(".out*"))

    check(
        other(family, tmp_path, lambda t: t.pop("a.weight"), "keys"),
        r"All models must have the same weights; only one of .* has a\.weight",
    )
    grown = other(family, tmp_path, lambda t: t.update({"embed_tokens.weight": torch.zeros(12, 4)}), "grown")
    check(grown, r"must have weights of the shapes of its start, got \(12, 4\) instead of \(9, 4\) for embed_tokens\.weight")
    check(
        other(family, tmp_path, lambda t: t["b.weight"].fill_(float("nan")), "nan"),
        r"must be finite, got NaN or infinity in b\.weight",
    )
    check(tmp_path / "missing", "does not exist")
    found = run(Resta(), family.base, family.aligned, [grown], tmp_path / "copied", copy_resized=True)
    assert found["copied"] == ["embed_tokens.weight"]
    assert torch.equal(weights(tmp_path / "copied")["embed_tokens.weight"], torch.zeros(12, 4))


def test_refuses_an_aligned_model_that_is_its_base(family, tmp_path):
    copy = model(tmp_path / "copy", family.weights["base"])
    for aligned in (family.base, copy):
        with pytest.raises(UserError, match="must have an aligned model that differs from the base, got the same weights"):
            open_realignment(family.base, aligned, [family.tuned])


def test_refuses_quantised_weights_pickles_and_folders_without_weights(family, tmp_path):
    quantised = model(tmp_path / "int4", family.weights["tuned"], quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"must hold plain weights, got quantised ones \(gptq\)"):
        open_realignment(family.base, family.aligned, [quantised])
    bytes8 = model(tmp_path / "int8", family.weights["tuned"] | {"a.weight": torch.zeros(6, 4, dtype=torch.int8)})
    with pytest.raises(UserError, match=r"a\.weight must be .* got I8\. Convert the file first"):
        open_realignment(family.base, family.aligned, [bytes8])
    pickled = model(tmp_path / "pickled", family.weights["tuned"])
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"must hold safetensors, got the pickle pytorch_model\.bin"):
        open_realignment(family.base, family.aligned, [pickled])
    torn = model(tmp_path / "torn", family.weights["tuned"], shards=2)
    (torn / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="must hold all of its 2 shards, got no model-00002"):
        open_realignment(family.base, family.aligned, [torn])


def test_refuses_adapters_of_other_models_bases_and_mixtures(family, tmp_path):
    peft_adapter(tmp_path / "one", factors(0, MODULES), base_model_name_or_path="org/one")
    peft_adapter(tmp_path / "two", factors(1, MODULES), base_model_name_or_path="org/two")
    with pytest.raises(UserError, match="All adapters must be of one base model, got different ones by name"):
        open_realignment("base", tmp_path / "one", [tmp_path / "two"])
    open_realignment("base", tmp_path / "one", [tmp_path / "two"], allow_base_mismatch=True)
    peft_adapter(tmp_path / "wide", factors(1, {"a": (6, 5)}))
    with pytest.raises(UserError, match=r"must be an adapter of .*aligned, got a of shape \(6, 5\), where that has \(6, 4\)"):
        open_realignment(family.base, family.aligned, [tmp_path / "wide"])
    with pytest.raises(UserError, match="must be whole models or adapters, got both"):
        open_realignment(family.base, family.aligned, [family.tuned, tmp_path / "wide"])
    peft_adapter(tmp_path / "turned", factors(1, {"a": (6, 4)}), fan_in_fan_out=True)
    with pytest.raises(UserError, match="whose weights are stored transposed"):
        open_realignment(family.base, family.aligned, [tmp_path / "turned"])


def test_refuses_outputs_that_are_something_else(family, tmp_path):
    with pytest.raises(UserError, match=r"exists and is not a realignment"):
        run(Resta(), family.base, family.aligned, [family.tuned], family.tuned)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a realignment"):
        run(Resta(), family.base, family.aligned, [family.tuned], tmp_path / "busy")
    assert (tmp_path / "busy" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="A realignment of whole models must be a whole model"):
        run(Resta(), family.base, family.aligned, [family.tuned], tmp_path / "out", rank=4)


def test_a_result_beyond_half_precision_is_refused(family, tmp_path):
    huge = model(tmp_path / "huge", {name: (60000 * torch.ones_like(t)).half() for name, t in family.weights["tuned"].items()})
    with pytest.raises(UserError, match=r"The realigned .* must be finite in torch\.float16, got NaN or infinity"):
        run(Resta(strength=1e6), family.base, family.aligned, [huge], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    assert json.loads((family.base / "config.json").read_text())["model_type"] == "toy"  # inputs are as they were
