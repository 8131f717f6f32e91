from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.world import app
from valign.detectors.oracle import OracleDetector, OracleNet, save_oracle
from valign.files import read_json
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.encoders.clip import ClipEncoder
from valign.worlds.shapes.build.oracle import CONFIG, take_weights
from valign.worlds.shapes.build.unet import new_unet, take_unet
from valign.worlds.shapes.world import SHAPES


@pytest.mark.slow
def test_one_command_builds_a_whole_world_and_does_nothing_the_second_time(tmp_path):
    out = tmp_path / "world"
    run = ["build", "shapes", "-o", str(out), "--share", "0.001"]
    first = CliRunner().invoke(app, run)
    assert first.exit_code == 0, first.output
    model = load_model(out / "model", device="cpu")
    (image,) = model.generate(["a red circle"], seeds=[0], sampling=SamplingConfig(steps=2))
    oracle, clip = OracleDetector(out / "oracle", domain=()), ClipEncoder(out / "clip")
    assert oracle.detect([image]).shape == (1, len(oracle.card.classes))
    assert clip.score([image], ["a red circle"]).shape == (1,)
    assert read_json(out / "run.json")["results"]["oracle"] == dict(oracle.config.measured)
    record = read_json(out / "model" / "valign_world.json")
    assert record == {"world": "shapes", "version": SHAPES.version}
    assert record == read_json(SHAPES.model_folder() / "valign_world.json")
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert CliRunner().invoke(app, run).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == written


def test_an_earlier_oracle_lends_its_layers_and_the_rows_of_known_names(tmp_path):
    torch.manual_seed(0)
    known = tuple(reversed(CONFIG.glyphs[3:]))
    earlier = replace(CONFIG, glyphs=known, categories={known[0]: "hate"}, compositions={}, styles=CONFIG.styles[:2])
    save_oracle(tmp_path, OracleNet(earlier), earlier)
    old, net = OracleDetector(tmp_path, domain=()), OracleNet(CONFIG)
    own = net.glyph.weight.detach().clone()
    take_weights(net, old)
    now, before = net.state_dict(), old.net.state_dict()
    assert torch.equal(now["body.0.weight"], before["body.0.weight"])
    assert torch.equal(now["glyph.weight"][3:-1], before["glyph.weight"][:-1].flip(0))
    assert torch.equal(now["glyph.bias"][-1], before["glyph.bias"][-1])  # "empty"
    assert torch.equal(now["glyph.weight"][:3], own[:3])
    assert torch.equal(now["style.weight"][:2], before["style.weight"])


def test_an_earlier_unet_is_turned_towards_another_text_encoder():
    folder = SHAPES.model_folder()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    turn = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0]
    text.final_layer_norm.register_forward_hook(lambda module, inputs, out: out @ turn)
    net = new_unet()
    take_unet(net, folder, text, tokenizer, seed=0, captions=80)
    old = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    expected = old[name].float() @ turn  # keys of turned states are those of the states before
    error = (net.state_dict()[name] - expected).norm() / expected.norm()
    assert error < 0.25  # 1.4 for a turn that was not found
    assert torch.equal(net.state_dict()["conv_in.weight"], old["conv_in.weight"].float())


def test_a_start_that_is_no_bundle_is_refused_before_any_work(tmp_path):
    found = CliRunner().invoke(app, ["build", "shapes", "-o", str(tmp_path / "world"), "--start", str(tmp_path)])
    assert isinstance(found.exception, UserError)
    assert "must be a world's bundle, got a folder without oracle/oracle.safetensors" in str(found.exception)
    assert not (tmp_path / "world").exists()
