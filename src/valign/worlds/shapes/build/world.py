"""Make every file of the shapes world's bundle, in order; an interrupted build goes on where it stopped."""

from dataclasses import asdict, replace
from pathlib import Path

from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from valign.checks import UserError
from valign.detectors.oracle import OracleConfig
from valign.files import hash_file, hash_value, write_json
from valign.models.files.origin import WORLD_FILE
from valign.runs import Run
from valign.worlds.shapes.build import clip, oracle, text, unet, vae
from valign.worlds.shapes.build.fit import Budget
from valign.worlds.shapes.build.tokenizer import train_tokenizer
from valign.worlds.shapes.vocabulary import VERSION

STARTS = ("oracle/oracle.safetensors", "clip/model.safetensors", "model/unet/config.json", "model/vae/config.json")


def build_world(out: Path, *, seed: int = 0, share: float = 1.0, start: Path | None = None) -> None:
    """Train tokenizer, oracle, VAE, text encoder, CLIP and U-Net into ``out`` (`model/`, `oracle/`, `clip/`, and `logs/`).

    Args:
        share: Part of each network's training steps, in (0, 1]; below 1 only to try the build.
        start: Bundle of an earlier version. Its oracle, CLIP's vision side, U-Net and the VAE's decoder go on for fewer steps;
            its encoder of images stays as it is. Tokenizer and text encoder are made from nothing: they learn the new words.
    """
    if start is not None:
        lacking = [name for name in STARTS if not (start / name).is_file()]
        if lacking:
            raise UserError(f"{start} must be a world's bundle, got a folder without {', '.join(lacking)}. Name another --start.")
    logs = out / "logs"
    chosen = {
        "oracle": oracle.FURTHER if start else oracle.BUDGET,
        "vae": vae.FURTHER if start else vae.BUDGET,
        "clip": clip.FURTHER if start else clip.BUDGET,
        "text": text.BUDGET,
    }

    def shortened(budget: Budget) -> Budget:
        return replace(budget, steps=max(2, round(share * budget.steps)))

    budgets = {name: shortened(budget) for name, budget in chosen.items()}
    rounds = [shortened(budget) for budget in (unet.FURTHER if start else (unet.BUDGET,))]
    scenes = max(100, round(share * unet.SCENES))
    recipe: dict[str, object] = {name: asdict(budget) for name, budget in budgets.items()}
    recipe |= {"unet": [asdict(budget) for budget in rounds], "scenes": scenes, "version": VERSION}
    inputs = {"world": hash_value("shapes")} | ({"start": _fingerprint(start)} if start else {})
    run = Run.open(out, step="world", recipe=recipe, inputs=inputs, seed=seed)
    if run.done:
        return
    words = logs / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(words) if (words / "vocab.json").exists() else train_tokenizer(words, seed=seed)
    if not (out / "oracle" / "oracle.json").exists():
        oracle.train_oracle(out / "oracle", logs, seed=seed, budget=budgets["oracle"], start=start and start / "oracle")
    if (out / "model" / "vae" / "config.json").exists():
        autoencoder = AutoencoderKL.from_pretrained(out / "model" / "vae").float()
    else:
        earlier = AutoencoderKL.from_pretrained(start / "model" / "vae").float() if start else None
        autoencoder = vae.train_vae(out / "model" / "vae", logs, seed=seed, budget=budgets["vae"], start=earlier)
    encoder = text.train_text(logs, tokenizer, seed=seed, budget=budgets["text"])
    if not (out / "clip" / "config.json").exists():
        clip.train_clip(out / "clip", logs, encoder, tokenizer, seed=seed, budget=budgets["clip"], start=start and start / "clip")
    unet.train_unet(
        out / "model",
        logs,
        autoencoder,
        encoder,
        tokenizer,
        seed=seed,
        rounds=rounds,
        scenes=scenes,
        start=start and start / "model",
    )
    write_json(out / "model" / WORLD_FILE, {"world": "shapes", "version": VERSION})
    run.finish(oracle=dict(OracleConfig.read(out / "oracle" / "oracle.json").measured))


def _fingerprint(start: Path) -> str:
    return hash_value([hash_file(path) for path in sorted(start.rglob("*.safetensors"))])
