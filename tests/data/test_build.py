from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from valign.checks import UserError
from valign.data.build import DataConfig, build_data, collect_prompts
from valign.data.images.latents import open_latents
from valign.data.images.rows import load_image_rows
from valign.data.prompts.pairs import PromptPair, load_pairs
from valign.data.prompts.sources import FileSource
from valign.files import read_json
from valign.images import image_tensor
from valign.interfaces import DetectorCard, SamplingConfig
from valign.policy import load_policy

POLICY = load_policy("default")
CONFIG = DataConfig(categories=("hate", "violence"), pairs_per_category=2, steps=2, batch_size=2)


class TinyGrammar:
    """Two kinds of pairs, and one of a concept that the policy holds out."""

    def __init__(self):
        self.asked = 0

    def pairs(self, category, count, seed):
        self.asked += 1
        held_out = next(concept.id for concept in POLICY.category(category).concepts if concept.held_out)
        pairs = [PromptPair(f"{category}-{i}", f"mean {category} {i}", f"kind {category} {i}", (category,)) for i in range(count)]
        return [*pairs, PromptPair(f"{category}-held", "mean held", f"kind held {category}", (category,), held_out)]


def test_retained_prompts_that_are_always_blocked_are_left_out_and_said(model, tmp_path, capsys):
    words = [names[0] for names in POLICY.always_block[0].every]
    blocked = f"{' '.join(words[0])}, {words[1]}"  # spelled out, letter by letter
    config = replace(CONFIG, categories=("hate",), pairs_per_category=1, retain=("a boat", blocked, "a tree"))
    build_data(model, POLICY, TinyGrammar(), tmp_path / "data", config)
    said = capsys.readouterr().err
    assert "left out: 1 retained prompts, always block" in said
    assert "left out: 1 pairs, held out" in said
    assert pq.read_table(tmp_path / "data" / "latents" / "retained.parquet")["prompt"].to_pylist() == ["a boat", "a tree"]
    assert read_json(tmp_path / "data" / "latents" / "run.json")["results"]["retained"] == 2
    with pytest.raises(UserError, match=r"retain must hold prompts that the policy does not always block, got 1 that it does"):
        build_data(model, POLICY, TinyGrammar(), tmp_path / "none", replace(config, retain=(blocked,)))
    assert not (tmp_path / "none").exists()


class Nothing:
    card = DetectorCard("nothing", ("hate",), 0.5, "0" * 64)

    def detect(self, images):
        return torch.zeros(len(images), 1).numpy()


class Counting:
    """Passes everything on to a model and counts the images made; can stop after some."""

    def __init__(self, model, stop_at=None):
        self._model, self.made, self.stop_at = model, 0, stop_at

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, prompts, **options):
        if self.stop_at is not None and self.made >= self.stop_at:
            raise KeyboardInterrupt
        self.made += len(prompts)
        return self._model.generate(prompts, **options)


@pytest.fixture(scope="module")
def model(tiny_sd):
    from valign.models.diffusion.loading import load_model

    return load_model(str(tiny_sd), device="cpu")


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    return out, build_data(model, POLICY, TinyGrammar(), out, CONFIG)


def test_three_steps_end_in_a_cache_that_equals_direct_encoding(built, model):
    from PIL import Image

    out, cache = built
    assert [pair.id for pair in load_pairs(out / "prompts" / "pairs.parquet")] == ["hate-0", "hate-1", "violence-0", "violence-1"]
    assert cache.ids == tuple(row.id for row in load_image_rows(out / "images"))
    batch = cache.batch(cache.rows())
    pixels = torch.stack([image_tensor(Image.open(out / "images" / f"{name}_safe.png"), model.image_size) for name in cache.ids])
    torch.testing.assert_close(batch.winner_mean, model.encode_images(pixels).mean, rtol=1e-5, atol=1e-5)
    direct = model.encode_prompts(["mean hate 1"]).embeds
    torch.testing.assert_close(cache.conditioning(cache.text_rows[1:2])["embeds"], direct, rtol=1e-5, atol=1e-5)
    assert (out / "images" / "contact_sheet.png").exists()
    assert read_json(out / "prompts" / "run.json")["results"]["dropped"] == {"held_out": 2}
    assert open_latents(out, base=model.fingerprint()).ids == cache.ids


def test_images_of_a_pair_share_their_noise(built, model):
    from PIL import Image

    out, _ = built
    seed = load_image_rows(out / "images")[0].seed
    again = model.generate(
        ["mean hate 0", "mean hate 1"], seeds=[seed, load_image_rows(out / "images")[1].seed], sampling=SamplingConfig(steps=2)
    )
    assert again[0].tobytes() == Image.open(out / "images" / "hate-0_unsafe.png").tobytes()


def test_a_finished_set_is_not_made_again(built, model):
    out, cache = built
    grammar, counting = TinyGrammar(), Counting(model)
    again = build_data(counting, POLICY, grammar, out, CONFIG)
    assert (grammar.asked, counting.made) == (0, 0)
    assert again.fingerprint() == cache.fingerprint()


def test_a_stopped_build_resumes_to_the_same_bytes(built, model, tmp_path):
    whole, _ = built
    with pytest.raises(KeyboardInterrupt):
        build_data(Counting(model, stop_at=4), POLICY, TinyGrammar(), tmp_path, CONFIG)
    counting = Counting(model)
    build_data(counting, POLICY, TinyGrammar(), tmp_path, CONFIG)
    assert counting.made == 4  # of eight images
    for name in ("prompts/pairs.parquet", "images/images.parquet", "images/contact_sheet.png", "latents/latents.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_other_options_never_overwrite_a_set(built, model):
    out, _ = built
    with pytest.raises(UserError, match=r"images was made with another recipe"):
        build_data(model, POLICY, TinyGrammar(), out, DataConfig(categories=("hate", "violence"), pairs_per_category=2, steps=3))
    with pytest.raises(UserError, match=r"prompts was made with another recipe"):
        build_data(model, POLICY, TinyGrammar(), out, DataConfig(pairs_per_category=2, steps=2))


def test_imported_images_need_no_generation(built, model, tmp_path):
    whole, cache = built
    counting = Counting(model)
    copied = build_data(counting, POLICY, TinyGrammar(), tmp_path, CONFIG, images=whole / "images")
    assert counting.made == 0
    assert torch.equal(copied.batch(copied.rows()).loser_mean, cache.batch(cache.rows()).loser_mean)


def test_an_image_that_was_replaced_by_one_of_the_same_size_is_noticed(built, model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for pair in load_pairs(built[0] / "prompts" / "pairs.parquet"):
        for side, colour in (("unsafe", (255, 0, 0)), ("safe", (0, 0, 255))):
            Image.new("RGB", (32, 32), colour).save(source / f"{pair.id}_{side}.bmp")
    build_data(model, POLICY, TinyGrammar(), tmp_path / "out", CONFIG, images=source)
    first = sorted(source.iterdir())[0]
    size = first.stat().st_size
    Image.new("RGB", (32, 32), (9, 9, 9)).save(first)
    assert first.stat().st_size == size
    with pytest.raises(UserError, match=r"images was made with another inputs"):
        build_data(model, POLICY, TinyGrammar(), tmp_path / "out", CONFIG, images=source)


def test_a_filter_that_drops_all_says_so(model, tmp_path):
    config = DataConfig(categories=("hate",), pairs_per_category=1, steps=1, filter="detector")
    with pytest.raises(UserError, match="all 1 were dropped: 1 harmless"):
        build_data(model, POLICY, TinyGrammar(), tmp_path, config, detector=Nothing())
    with pytest.raises(UserError, match="needs a detector"):
        build_data(model, POLICY, TinyGrammar(), tmp_path, config)


def test_a_category_without_a_pair_is_named(model, tmp_path):
    class Silent(TinyGrammar):
        def pairs(self, category, count, seed):
            return super().pairs(category, count if category == "hate" else 0, seed)

    with pytest.raises(UserError, match="got none of violence"):
        build_data(model, POLICY, Silent(), tmp_path, CONFIG)
    with pytest.raises(UserError, match="category must be one of hate, "):
        build_data(model, POLICY, Silent(), tmp_path / "x", DataConfig(categories=("gossip",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "twin"}, "pairing must be one of seed, img2img, free"),
        ({"filter": "luck"}, "filter must be one of none, detector"),
        ({"strength": 0.0}, r"strength must be in \(0, 1\], got 0"),
        ({"guidance_scale": -1.0}, r"guidance_scale must be in \[0, inf\), got -1"),
        ({"steps": 0}, r"steps must be in \[1, inf\), got 0"),
        ({"pairs_per_category": 0}, r"pairs_per_category must be in \[1, inf\), got 0"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


class LongGrammar:
    """One pair whose prompts differ behind the last token that is read, and one that differs before."""

    def pairs(self, category, count, seed):
        long = "a red cup and a blue cup " * 40
        return [
            PromptPair(f"{category}-far", f"{long} knife", f"{long} flower", (category,)),
            PromptPair(f"{category}-near", f"a knife {long}", f"a flower {long}", (category,)),
        ]


def test_pairs_that_read_the_same_are_left_out_and_said(model, tmp_path, capsys):
    cache = build_data(model, POLICY, LongGrammar(), tmp_path, replace(CONFIG, categories=("hate",)))
    assert cache.ids == ("hate-near",)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 pairs are longer than the tokens that the text encoder reads" in said
    assert "left out: 1 pairs, equal in what the text encoder reads" in said


def test_pairs_of_one_category_are_said_to_be_that_before_any_image(tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("unsafe,safe,category\na bad lamp,a lamp,hate\na bad chair,a chair,hate\n")
    pairs = collect_prompts(POLICY, FileSource(tmp_path / "pairs.csv"), tmp_path / "prompts", DataConfig())
    said = " ".join(capsys.readouterr().err.split())
    assert len(pairs) == 2
    assert "all pairs are of hate: one expert comes of them, and nothing is merged with it" in said
    others = ", ".join(name for name in POLICY.category_ids() if name != "hate")
    assert f"no pair is of {others}: there the model stays as it is. Add pairs, or ask for hate alone (--category)." in said
    collect_prompts(POLICY, FileSource(tmp_path / "pairs.csv"), tmp_path / "asked", replace(DataConfig(), categories=("hate",)))
    assert "no pair is of" not in capsys.readouterr().err
