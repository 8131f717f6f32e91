"""Make every file of the shapes world's bundle, in order; an interrupted build goes on where it stopped."""

from dataclasses import asdict, replace
from pathlib import Path

from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from valign.detectors.oracle import OracleConfig
from valign.files import hash_value
from valign.runs import Run
from valign.worlds.shapes.build import clip, oracle, text, unet, vae
from valign.worlds.shapes.build.tokenizer import train_tokenizer


def build_world(out: Path, *, seed: int = 0, share: float = 1.0) -> None:
    """Train tokenizer, oracle, VAE, CLIP and U-Net into ``out`` (`model/`, `oracle/`, `clip/`, and `logs/`).

    Args:
        share: Part of each network's training steps, in (0, 1]; below 1 only to try the build.
    """
    logs = out / "logs"
    budgets = {
        name: replace(budget, steps=max(2, round(share * budget.steps)))
        for name, budget in {
            "oracle": oracle.BUDGET,
            "vae": vae.BUDGET,
            "clip": clip.BUDGET,
            "text": text.BUDGET,
            "unet": unet.BUDGET,
        }.items()
    }
    scenes = max(100, round(share * unet.SCENES))
    recipe = {name: asdict(budget) for name, budget in budgets.items()} | {"scenes": scenes}
    run = Run.open(out, step="world", recipe=recipe, inputs={"world": hash_value("shapes")}, seed=seed)
    if run.done:
        return
    words = logs / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(words) if (words / "vocab.json").exists() else train_tokenizer(words, seed=seed)
    if not (out / "oracle" / "oracle.json").exists():
        oracle.train_oracle(out / "oracle", logs, seed=seed, budget=budgets["oracle"])
    if (out / "model" / "vae" / "config.json").exists():
        autoencoder = AutoencoderKL.from_pretrained(out / "model" / "vae").float()
    else:
        autoencoder = vae.train_vae(out / "model" / "vae", logs, seed=seed, budget=budgets["vae"])
    encoder = text.train_text(logs, tokenizer, seed=seed, budget=budgets["text"])
    if not (out / "clip" / "config.json").exists():
        clip.train_clip(out / "clip", logs, encoder, tokenizer, seed=seed, budget=budgets["clip"])
    unet.train_unet(
        out / "model",
        logs,
        autoencoder,
        encoder,
        tokenizer,
        seed=seed,
        budget=budgets["unet"],
        scenes=scenes,
    )
    run.finish(oracle=dict(OracleConfig.read(out / "oracle" / "oracle.json").measured))
