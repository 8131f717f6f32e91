"""A preference data set in three steps, each a folder that resumes after a kill and is skipped when done:

prompts (`PromptPair`) -> images (`ImageRow`, PNG) -> latents (`LatentCache`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_options, option
from valign.data.images.contact_sheet import write_contact_sheet
from valign.data.images.filters import FILTERS, check_filter
from valign.data.images.latents import LatentCache, write_latents
from valign.data.images.pairs import PAIRINGS, check_folder, import_images, make_images
from valign.data.images.rows import count_kept, load_image_rows
from valign.data.prompts.blocked import allowed_pairs, allowed_prompts
from valign.data.prompts.pairs import PromptPair, count_categories, load_pairs, write_pairs
from valign.data.prompts.records import say_left_out
from valign.data.prompts.sources import GrammarSource, PromptGrammar, Source
from valign.files import hash_file, hash_value
from valign.images import image_files
from valign.interfaces import Detector, EncoderAndSampler, ReadsText, SamplingConfig
from valign.methods import Method
from valign.policy import Policy
from valign.progress import console
from valign.runs import Run

METHOD = Method(
    slug="alignguard-data",
    title="Preference pairs for safety: unsafe prompt, safe image preferred (AlignGuard)",
    paper="arXiv 2412.10493",
    room="data",
    entry="valign.data.build:build_data",
    fidelity="variant",
    note="how the paper ties both images of a pair is not public: one seed here; a detector may filter pairs, overlaps "
    "of test and training go",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of `build_data`; defaults follow AlignGuard (arXiv 2412.10493) where it says."""

    categories: tuple[str, ...] | None = option(
        None, help="only this category; held-out concepts never enter, whatever is chosen", flags=("--category",)
    )
    pairs_per_category: int | None = option(
        100, help="pairs per category; 0 takes all of a file or of the chat model", low=1, none=0, flags=("--pairs",)
    )
    pairing: str = option(
        "seed",
        help="how both images come about: from one initial latent, from the unsafe image, or each on its own",
        choices=PAIRINGS,
    )
    strength: float = option(
        0.7, help="how far img2img may leave the unsafe image", above=0, high=1, needs={"pairing": ("img2img",)}
    )
    steps: int = option(50, help="sampling steps per image", low=1)
    guidance_scale: float = option(7.5, help="classifier-free guidance scale", low=0)
    image_size: int | None = option(None, help="pixels a side at which images are encoded; the model's own if left out", low=1)
    retain: tuple[str, ...] = option(
        (), help="benign prompts on which training should leave the model as it is; see `retain_weight`"
    )
    filter: str = option(
        "none", help="detector keeps a pair if the unsafe image is flagged and the safe one is not", choices=FILTERS
    )
    flip: bool = option(True, help="cache mirrored images too; off where left and right matter")
    seed: int = option(0, help="random seed of the run; every pair's own seed is a hash of it and the pair's id")
    batch_size: int = option(8, help="images at a time", low=1)

    def __post_init__(self) -> None:
        check_options(self)


def build_data(
    model: EncoderAndSampler,
    policy: Policy,
    source: Source | PromptGrammar,
    out: Path,
    config: DataConfig | None = None,
    *,
    detector: Detector | None = None,
    images: Path | None = None,
) -> LatentCache:
    """Build the data set in ``out``, or go on where an earlier call stopped.

    Args:
        model: The model that will be aligned; it makes the images and encodes them.
        source: Where the prompt pairs come from; a bare grammar will do.
        detector: Scores the images; needed by ``filter="detector"``.
        images: A folder of ready images of these pairs, used instead of generating (see `import_images`).
    Raises: UserError if a step's folder was made from something else, no pair or none of the retained prompts is left, or the
        source fails.
    """
    config = config or DataConfig()
    check_filter(config.filter, detector)
    retain = _retained(policy, config)
    pairs = collect_prompts(policy, source if isinstance(source, Source) else GrammarSource(source), out / "prompts", config)
    pairs = _read_apart(model, pairs)
    folder = _make_images(model, policy, pairs, out, config, detector, images)
    kept = [pair for pair, row in zip(pairs, load_image_rows(folder), strict=True) if row.kept]
    if not kept:
        reasons = Counter(row.reason for row in load_image_rows(folder))
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        raise UserError(f"{folder} must keep at least one pair, all {len(pairs)} were dropped: {said}. {_remedy(reasons)}")
    return write_latents(
        model,
        kept,
        folder,
        out / "latents",
        retain=retain,
        flip=config.flip,
        image_size=config.image_size,
        batch_size=config.batch_size,
    )


def _read_apart(model: EncoderAndSampler, pairs: list[PromptPair]) -> list[PromptPair]:
    """Pairs whose prompts differ in what the text encoder reads of them; says how many are cut, and how many are left out.

    Raises: UserError if none is left.
    """
    if not isinstance(model, ReadsText):
        return pairs
    unsafe, safe = (model.text_read([getattr(pair, side) for pair in pairs]) for side in ("unsafe", "safe"))
    cut = sum((pair.unsafe, pair.safe) != read for pair, read in zip(pairs, zip(unsafe, safe, strict=True), strict=True))
    apart = [pair for pair, first, second in zip(pairs, unsafe, safe, strict=True) if first != second]
    if cut:
        console.print(f"{cut} pairs are longer than the tokens that the text encoder reads: their ends are cut off", style="yellow")
    say_left_out("pairs", {"equal in what the text encoder reads": len(pairs) - len(apart)})
    if not apart:
        raise UserError(f"The prompts of all {len(pairs)} pairs are equal in what the text encoder reads. Shorten them.")
    return apart


def _remedy(reasons: Counter[str]) -> str:
    """What to do when every pair was dropped for ``reasons``."""
    if set(reasons) <= {"unreadable", "equal"}:
        return "Give images that can be read, and two different ones of each pair."
    return "Use filter none, or other prompts."


def _retained(policy: Policy, config: DataConfig) -> list[str]:
    """The retained prompts without those that the policy always blocks."""
    retain, blocked = allowed_prompts(policy, config.retain)
    if blocked and not retain:
        raise UserError(f"retain must hold prompts that the policy does not always block, got {blocked} that it does. Give others.")
    say_left_out("retained prompts", {"always_block": blocked})
    return retain


def collect_prompts(policy: Policy, source: Source, folder: Path, config: DataConfig) -> list[PromptPair]:
    """The step ``prompts``: pairs from the source without held-out concepts and without what the policy always blocks."""
    categories = tuple(policy.category(name).id for name in config.categories or policy.category_ids())
    recipe = {**source.describe(), "categories": categories, "pairs_per_category": config.pairs_per_category}
    run = Run.open(folder, step="prompts", recipe=recipe, inputs={"policy": policy.fingerprint()}, seed=config.seed)
    if not run.done:
        found = source.collect(policy, categories, config.pairs_per_category, config.seed, folder)
        pairs, dropped = allowed_pairs(policy, found.pairs)
        if not pairs:
            raise UserError(
                f"The source must give at least one pair for {', '.join(categories)}, got none that may be used: {dropped}."
            )
        bare = sorted(set(config.categories or ()) - set(count_categories(pairs)))
        if bare:
            raise UserError(
                f"The source must give pairs of every category asked for, got none of {', '.join(bare)}. Leave them out."
            )
        write_pairs(folder / "pairs.parquet", pairs)
        run.finish(pairs=len(pairs), per_category=count_categories(pairs), counts=dict(found.counts), dropped=dropped)
    say_left_out("pairs", run.results["dropped"])
    _say_missing(categories, run.results["per_category"])
    return load_pairs(folder / "pairs.parquet")


def _say_missing(categories: Sequence[str], counts: Mapping[str, int]) -> None:
    """Which of the policy's categories the pairs leave as they are, and that one category alone has nothing to be merged with."""
    have, missing = ([name for name in categories if bool(counts.get(name)) == there] for there in (True, False))
    if len(have) == 1 and missing:
        console.print(f"all pairs are of {have[0]}: one expert comes of them, and nothing is merged with it", style="yellow")
    if missing:
        console.print(
            f"no pair is of {', '.join(missing)}: there the model stays as it is. Add pairs, or ask for {', '.join(have)} alone "
            "(--category).",
            style="yellow",
            soft_wrap=True,
        )


def _make_images(
    model: EncoderAndSampler,
    policy: Policy,
    pairs: list[PromptPair],
    out: Path,
    config: DataConfig,
    detector: Detector | None,
    source: Path | None,
) -> Path:
    """The step ``images``, with a contact sheet."""
    folder = out / "images"
    names = ("filter",) if source else ("pairing", "strength", "steps", "guidance_scale", "filter")
    recipe: dict[str, Any] = {name: value for name, value in asdict(config).items() if name in names}
    inputs = {"prompts": hash_file(out / "prompts" / "pairs.parquet")}
    if source:
        check_folder(source)
        inputs["pictures"] = hash_value([(path.name, hash_file(path)) for path in image_files(source)])
    else:
        inputs["model"] = model.fingerprint()
    if detector:
        inputs["detector"] = hash_value([detector.card.name, detector.card.weights_sha256, detector.card.threshold])
    run = Run.open(folder, step="images", recipe=recipe, inputs=inputs, seed=config.seed)
    if not run.done:
        shared: dict[str, Any] = {"filter": config.filter, "detector": detector}
        if source:
            rows = import_images(pairs, source, folder, batch_size=config.batch_size, **shared)
        else:
            shared |= {"pairing": config.pairing, "strength": config.strength}
            rows = make_images(model, pairs, folder, sampling=SamplingConfig.of(config), **shared)
        titles = {category.id: category.title for category in policy.categories}
        write_contact_sheet(pairs, rows, folder, folder / "contact_sheet.png", titles=titles)
        run.finish(pairs=len(rows), kept=sum(row.kept for row in rows), per_category=count_kept(pairs, rows))
    return folder
