"""A generator on disk: the same bytes come out, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from valign.adapters.sg_lora import SgLoraConfig, TaskExpert, build_library, fit_sg_lora, load_sg_lora, save_sg_lora
from valign.checks import UserError


def encode(text):
    return torch.randn(4, generator=torch.Generator().manual_seed(sum(map(ord, text)))) + 0.5


@pytest.fixture(scope="module", params=["none", "layer"])
def folder(request, tmp_path_factory):
    def state(seed):
        draw = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return {f"{m}.lora_A.weight": draw[0].T.contiguous() for m in "mn"} | {f"{m}.lora_B.weight": draw[1] + 1 for m in "mn"}

    experts = [
        TaskExpert(name=n, description=f"a {n}", checkpoints=[state(10 * i), state(10 * i + 1)], config={"r": 2}, start="s")
        for i, n in enumerate("abcd")
    ]
    config = SgLoraConfig(latent=2, hidden=5, steps=3, top_k=3, chunk=request.param)
    generator = fit_sg_lora(build_library(experts, encode), config)
    path = tmp_path_factory.mktemp("sg") / "generator"
    save_sg_lora(path, generator)
    return path, generator


@pytest.mark.parametrize("mode", ["sample", "mean", "merge"])
def test_a_loaded_generator_makes_the_same_bytes(folder, mode):
    path, generator = folder
    loaded = load_sg_lora(path)
    before, after = (made.generate(encode, "a red b", mode=mode, seed=3) for made in (generator, loaded))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
    assert loaded.library.start == "s"
    assert (loaded.config, loaded.losses, loaded.library.names) == (generator.config, generator.losses, generator.library.names)
    with pytest.raises(ValueError, match="must have its samples, got those of a loaded generator"):
        fit_sg_lora(loaded.library)


def test_folders_that_do_not_fit(folder, tmp_path):
    path, generator = folder
    with pytest.raises(UserError):
        save_sg_lora(path, generator)  # it is there already
    with pytest.raises(UserError):
        load_sg_lora(tmp_path)
    record = json.loads((path / "generator.json").read_text())
    (tmp_path / "generator.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"must hold generator\.safetensors, got none"):
        load_sg_lora(tmp_path)
    tensors = load_file(path / "generator.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "prior" not in name}, tmp_path / "generator.safetensors")
    with pytest.raises(UserError, match=r"generator\.safetensors must fit generator\.json"):
        load_sg_lora(tmp_path)
