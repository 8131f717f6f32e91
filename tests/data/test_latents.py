import hashlib
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from valign.checks import UserError
from valign.data.images.latents import EMPTY_PROMPT_ROW, open_latents, write_latents
from valign.data.prompts.pairs import PromptPair
from valign.files import read_json, write_json, write_text
from valign.images import image_tensor


@dataclass
class Made:
    embeds: torch.Tensor = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    mean: torch.Tensor = None
    std: torch.Tensor = None


class FakeEncoder:
    """Halves images by a lopsided 2 x 2 kernel (so mirroring before and after differ); embeds a prompt by its hash."""

    image_size, dtype = 8, torch.float32

    def __init__(self, name="a", sdxl=False, text_dtype=torch.float32, fail_after=None):
        self.name, self.sdxl, self.text_dtype, self.left, self.seen = name, sdxl, text_dtype, fail_after, 0

    def fingerprint(self):
        return hashlib.sha256(self.name.encode()).hexdigest()

    def encode_prompts(self, prompts):
        codes = torch.tensor([list(hashlib.sha256(p.encode()).digest()[:6]) for p in prompts], dtype=torch.float32) / 255
        extra = {"pooled": codes[:, :3], "time_ids": torch.full((len(prompts), 6), 8.0)} if self.sdxl else {}
        return Made(embeds=codes.reshape(-1, 3, 2).to(self.text_dtype), **extra)

    def encode_images(self, images):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.seen += len(images)
        kernel = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).expand(3, 1, 2, 2)
        mean = torch.nn.functional.conv2d(images, kernel, stride=2, groups=3)
        return Made(mean=mean, std=mean.abs() * 0.1)


PAIRS = [
    PromptPair("p0", "bad zero", "good zero", ("hate",), concept="alpha"),
    PromptPair("p1", "bad one", "good one", ("hate", "sexual"), concept="beta"),
    PromptPair("p2", "bad two", "good zero", ("violence",), concept="alpha"),
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for pair in PAIRS:
        for suffix in ("safe", "unsafe"):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{pair.id}_{suffix}.png")
    write_text(folder / "images.parquet", "stands for the table")
    return folder


def image(images, name):
    return image_tensor(Image.open(images / name), 8)[None]


def test_cached_latents_equal_direct_encoding_in_both_flip_states(tmp_path, images):
    model = FakeEncoder()
    cache = write_latents(model, PAIRS, images, tmp_path / "latents", batch_size=2)
    flip = torch.tensor([False, True, False])
    rows = torch.tensor([2, 0, 1])
    batch = cache.batch(rows, flip)
    for place, (row, mirrored) in enumerate(zip(rows.tolist(), flip.tolist(), strict=True)):
        for suffix, mean, std in (("safe", batch.winner_mean, batch.winner_std), ("unsafe", batch.loser_mean, batch.loser_std)):
            seen = image(images, f"p{row}_{suffix}.png")
            direct = model.encode_images(seen.flip(-1) if mirrored else seen)
            assert torch.equal(mean[place], direct.mean[0])
            assert torch.equal(std[place], direct.std[0])
    assert not torch.allclose(cache.batch(rows[1:2], ~flip[1:2]).winner_mean, batch.winner_mean[1:2].flip(-1))  # no latent flip


@pytest.mark.parametrize("text_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conditioning_equals_direct_encoding_and_row_0_is_the_empty_prompt(tmp_path, images, text_dtype):
    model = FakeEncoder(sdxl=True, text_dtype=text_dtype)
    cache = write_latents(model, PAIRS, images, tmp_path / "latents", batch_size=2)
    prompts = ["bad two", "", "good zero"]
    rows = torch.tensor([cache.text_rows[2], EMPTY_PROMPT_ROW, cache.safe_text_rows[0]])
    cached, direct = cache.conditioning(rows), model.encode_prompts(prompts)
    assert sorted(cached) == ["embeds", "pooled", "time_ids"]
    for name, tensor in cached.items():
        assert tensor.dtype == getattr(direct, name).dtype
        assert torch.equal(tensor, getattr(direct, name))
    assert cache.safe_text_rows[0] == cache.safe_text_rows[2]  # equal prompts are encoded once


def test_rows_of_a_category_hold_pairs_of_several_categories(tmp_path, images):
    cache = write_latents(FakeEncoder(), PAIRS, images, tmp_path / "latents")
    assert cache.rows().tolist() == [0, 1, 2]
    assert cache.rows("hate").tolist() == [0, 1]
    assert cache.rows("sexual").tolist() == [1]
    assert cache.rows(concepts={"alpha"}).tolist() == [0, 2]
    assert cache.rows("hate", concepts={"alpha"}).tolist() == [0]
    with pytest.raises(UserError, match="no pair of category 'shocking', only of hate, sexual, violence"):
        cache.rows("shocking")


def test_an_interrupted_cache_resumes_to_the_same_bytes(tmp_path, images):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_latents(FakeEncoder(), PAIRS, images, whole, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        write_latents(FakeEncoder(fail_after=6), PAIRS, images, broken, batch_size=1)  # four encodings a pair: stops in the second
    with pytest.raises(UserError, match=r"holds no cached latents|is unfinished"):
        open_latents(broken)
    second = FakeEncoder()
    write_latents(second, PAIRS, images, broken, batch_size=1)
    assert second.seen == 8  # the first pair was not encoded again
    for name in ("latents.safetensors", "text.safetensors", "index.parquet"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert not (broken / "progress.json").exists()
    finished = FakeEncoder()
    write_latents(finished, PAIRS, images, broken, batch_size=1)
    assert finished.seen == 0


def test_a_kill_between_the_last_batch_and_the_renaming_loses_nothing(tmp_path, images):
    out = tmp_path / "latents"
    write_latents(FakeEncoder(), PAIRS, images, out)
    whole = (out / "latents.safetensors").read_bytes()
    (out / "latents.safetensors").rename(out / "latents.safetensors.partial")
    write_json(out / "progress.json", {"latents.safetensors": 3})
    write_json(out / "run.json", {**read_json(out / "run.json"), "status": "running"})
    model = FakeEncoder()
    write_latents(model, PAIRS, images, out)
    assert model.seen == 0
    assert (out / "latents.safetensors").read_bytes() == whole


def test_a_missing_or_broken_image_is_named(tmp_path, images):
    (images / "p1_safe.png").write_bytes(b"half a pictu")
    with pytest.raises(UserError, match=r"p1_safe\.png must be an image that is read .* run `valign data build` again"):
        write_latents(FakeEncoder(), PAIRS, images, tmp_path / "latents")
    (images / "p1_safe.png").unlink()
    with pytest.raises(UserError, match=r"p1_safe\.png does not exist"):
        write_latents(FakeEncoder(), PAIRS, images, tmp_path / "latents")


def test_the_finished_file_is_plain_safetensors(tmp_path, images):
    cache = write_latents(FakeEncoder(), PAIRS, images, tmp_path / "latents", flip=False)
    tensors = load_file(tmp_path / "latents" / "latents.safetensors")
    assert sorted(tensors) == ["loser.mean", "loser.std", "winner.mean", "winner.std"]
    assert torch.equal(tensors["loser.std"], cache.batch(cache.rows()).loser_std)
    assert cache.latent_shape == (3, 4, 4)
    with pytest.raises(UserError, match="no mirrored latents"):
        cache.batch(cache.rows(), torch.tensor([True, False, False]))


def test_refuses_a_cache_of_another_base_model(tmp_path, images):
    write_latents(FakeEncoder("a"), PAIRS, images, tmp_path / "latents")
    assert len(open_latents(tmp_path, base=FakeEncoder("a").fingerprint())) == 3
    with pytest.raises(UserError, match="was encoded by base model"):
        open_latents(tmp_path, base=FakeEncoder("b").fingerprint())
    with pytest.raises(UserError, match="made with another inputs"):
        write_latents(FakeEncoder("b"), PAIRS, images, tmp_path / "latents")


def test_refuses_no_pairs_and_a_missing_cache(tmp_path, images):
    with pytest.raises(UserError, match="got 0 pairs"):
        write_latents(FakeEncoder(), [], images, tmp_path / "latents")
    with pytest.raises(UserError, match="holds no cached latents"):
        open_latents(tmp_path / "nowhere")


def test_image_tensor_crops_the_middle_and_spans_minus_one_to_one():
    wide = Image.new("RGB", (12, 4), "black")
    wide.paste("white", (4, 0, 8, 4))
    assert torch.equal(image_tensor(wide, 4), torch.ones(3, 4, 4))
    assert torch.equal(image_tensor(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4), torch.ones(3, 4, 4))  # transparent is white
    assert torch.equal(image_tensor(Image.new("L", (4, 4), 0), 4), -torch.ones(3, 4, 4))


def test_retained_prompts_have_rows_of_their_own_and_default_to_the_safe_twins(tmp_path, images):
    model = FakeEncoder()
    benign = ["a boat", PAIRS[0].safe, "a boat"]
    cache = write_latents(model, PAIRS, images, tmp_path / "given", retain=benign)
    torch.testing.assert_close(cache.conditioning(cache.retained_rows)["embeds"], model.encode_prompts(benign[:2]).embeds)
    plain = write_latents(model, PAIRS, images, tmp_path / "plain")
    assert set(plain.retained_rows.tolist()) == set(plain.safe_text_rows.tolist())
    with pytest.raises(UserError, match="retain"):
        write_latents(model, PAIRS, images, tmp_path / "plain", retain=["a boat"])
