"""RegMean's variants in one tiny run on the bundled model: each is made and measured, nothing is shown to work."""

import json
from dataclasses import replace
from html import unescape

import pytest
import torch

from valign.cli.common import resolve_model
from valign.data.build import DataConfig
from valign.evaluation import Suite
from valign.experiments.fusion import VARIANTS, bench_fusion
from valign.experiments.methods.trained import methods_config
from valign.merging import MERGES
from valign.models.files.adapter_files import open_adapter
from valign.recipes.alignguard import AlignGuardRecipe
from valign.training.engine.loop import TrainingLoop
from valign.worlds.shapes.world import SHAPES


def tiny(seed):
    short = {"steps": 2, "pairs_per_step": 2, "val_pairs": 1, "val_draws": 1, "validate_every": 2, "seed": seed}
    config = methods_config(SHAPES, "small", categories=("hate", "violence"), seed=seed)
    data = DataConfig(categories=("hate", "violence"), pairs_per_category=2, steps=1, flip=False, retain=("a tree",), seed=seed)
    align = replace(config.align, data=data, experts=AlignGuardRecipe.shapes(**short), steps=1)
    return replace(config, align=align)


def change(adapter):
    return {name: lora.up.double() @ lora.down.double() for name, lora in open_adapter(adapter).items()}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    out = tmp_path_factory.mktemp("fusion")
    world = replace(SHAPES, suite=lambda **options: Suite("few", SHAPES.suite(**options).prompts[::60]))
    model = resolve_model("shapes", device="cpu")

    def run():
        return bench_fusion(world, model, out, [tiny(3)])

    return out, run, run()


@pytest.mark.slow
def test_every_variant_is_measured(fused):
    out, _, summary = fused
    assert [system["name"] for system in summary["systems"]] == ["base", *VARIANTS]
    page = unescape((out / "fusion/evaluation/report.html").read_text())
    assert all(variant.text in page for variant in VARIANTS.values())


@pytest.mark.slow
def test_each_setting_reaches_the_fusion(fused):
    out = fused[0] / "fusion" / "run-0"
    default = change(out / "default" / "adapter")
    assert all(torch.allclose(default[name], 0.7 * found) for name, found in change(out / "weight-1" / "adapter").items())
    for name in VARIANTS:
        if name == "default" or VARIANTS[name].settings.keys() & {"per_category", "captions"}:
            continue  # so little data makes no difference there
        found = change(out / name / "adapter")
        assert found.keys() != default.keys() or any(not torch.equal(found[one], default[one]) for one in found), name
    assert len(change(out / "all-layers" / "adapter")) > len(default)


@pytest.mark.slow
def test_a_second_call_trains_nothing(fused, monkeypatch):
    _, run, summary = fused
    monkeypatch.setattr(TrainingLoop, "run", None)
    assert run() == json.loads(json.dumps(summary))


def test_every_variant_names_settings_of_the_merge():
    for name, variant in VARIANTS.items():
        settings = {key: value for key, value in variant.settings.items() if key != "weight"}
        assert MERGES["regmean"](**settings) != MERGES["regmean"]() or not settings, name
