import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from valign.checks import UserError
from valign.models.files.origin import model_origins
from valign.worlds import world


def test_copies_other_precisions_and_tuned_denoisers_keep_their_origin(tmp_path):
    bundled = world("shapes").model_folder()
    copy = tmp_path / "copy"
    shutil.copytree(bundled / "vae", copy / "vae")
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()  # the installed file stays
    save_file({name: tensor.float() for name, tensor in weights.items()}, file)
    assert {origin for origin in model_origins(bundled) if origin.startswith("autoencoder:")} == set(model_origins(copy))
    weights[min(weights)] = weights[min(weights)] + 1
    save_file(weights, file)
    assert not set(model_origins(bundled)) & set(model_origins(copy))


def test_a_world_names_itself(tmp_path):
    assert model_origins(tmp_path) == ()
    record = tmp_path / "valign_world.json"
    record.write_text(json.dumps({"world": "shapes", "version": 2}))
    assert model_origins(tmp_path) == ("world:shapes",)
    record.write_text(json.dumps(["shapes"]))
    with pytest.raises(UserError, match=r"valign_world\.json must name its world, as \{.*\}; got \['shapes'\]"):
        model_origins(tmp_path)


def test_a_broken_autoencoder_is_named(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "a.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"a\.safetensors could not be read"):
        model_origins(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "vae" / "a.safetensors")
    assert len(model_origins(tmp_path)) == 1
