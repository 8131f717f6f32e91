"""A detector that holds under bad conditions: its encoder adapted on unlabelled pairs, its error measured under each condition."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_choice
from valign.data.images.conditions import CONDITIONS, ImagePair, under
from valign.data.images.labelled import HarmExample, LabelledImages
from valign.detectors import build
from valign.detectors.adaptable import tower_of
from valign.detectors.errors import CategoryError, measure_detector
from valign.detectors.fitting import detector_name
from valign.detectors.record import DetectorRecord, write_record
from valign.files import atomic_folder, hash_value
from valign.interfaces import Detector, DetectorCard
from valign.methods import Method
from valign.runs import Run, versions
from valign.training.tasks.condition_robust import AdaptConfig, adapt_tower

METHOD = Method(
    slug="condition-robust",
    title="Condition-robust detectors: CMA on pairs of one content under two conditions",
    paper="arXiv 2303.05194",
    room="recipes",
    entry="valign.recipes.condition_robust:adapt_detector",
    fidelity="variant",
    note="detectors instead of segmentation; conditions are made of clean images unless pairs are given, so places match exactly",
)
CLEAN = "clean"


def adapt_detector(
    detector: Detector,
    pairs: Sequence[ImagePair],
    test: LabelledImages,
    out: Path,
    *,
    runs: Path,
    conditions: Sequence[str] = tuple(CONDITIONS),
    config: AdaptConfig | None = None,
    origin: str = "",
) -> dict[str, dict[str, CategoryError]]:
    """Adapt ``detector`` (which is changed) and write it to the new folder ``out``, with its errors before and after.

    Args:
        pairs: Without labels; conditions are made for those that have a clean image alone.
        test: Labelled images, for the errors alone.
        runs: Folder of the training, which resumes.
        conditions: Of `CONDITIONS`; those that are trained on, and measured.
        origin: Of the pairs, for the record.
    Returns: By condition, "clean" first: the errors over all harm "before" and "after".
    Raises: UserError if ``out`` exists, or the detector has nothing to adapt; nothing is written then.
    """
    config = config or AdaptConfig()
    for name in conditions:
        check_choice("--condition", name, CONDITIONS)
    if out.exists():
        raise UserError(f"{out} exists. Choose another --out, or delete it first.")
    own = all(pair.adverse is not None for pair in pairs)
    if not own and not conditions:
        raise UserError("Adaptation needs at least one condition where pairs are made of clean images, got none. Name --condition.")
    before = errors_by_condition(detector, test, conditions, seed=config.seed)
    earlier, tower = detector.card, tower_of(detector)
    run = Run.open(
        runs,
        step="condition-robust",
        recipe=config.recipe() | {"conditions": list(conditions)},
        inputs={"detector": earlier.weights_sha256, "pairs": pairs_hash(pairs)},
        seed=config.seed,
    )
    adapt_tower(tower, pairs, conditions, config, runs)
    with atomic_folder(out) as folder:
        kind, options = tower.save(folder)
        card = replace(_card_of(kind, folder, options, earlier), name=detector_name(out), sensitivity=None, specificity=None)
        card = replace(card, positives=None, negatives=None)
        made = {
            "adapted_from": earlier.name,
            "adapted_from_sha256": earlier.weights_sha256,
            "pairs": origin,
            "pairs_sha256": pairs_hash(pairs),
            "conditions": list(conditions),
            **config.recipe(),
            "versions": versions(),
        }
        record = DetectorRecord(kind=kind, card=card, options=options, made=made)
        write_record(folder, record)
        adapted = build(str(folder))
        after = errors_by_condition(adapted, test, conditions, seed=config.seed)
        found = {name: {"before": before[name], "after": after[name]} for name in before}
        measured = measure_detector(adapted, test.examples)
        rows = {name: {when: asdict(row) for when, row in both.items()} for name, both in found.items()}
        about = measured.record(images=f"{len(test.examples)} labelled images", sha256=test.fingerprint()) | {"conditions": rows}
        write_record(folder, replace(record, card=measured.on(card), measured=about))
    run.finish(conditions=rows)
    return found


def errors_by_condition(
    detector: Detector, test: LabelledImages, conditions: Sequence[str], *, seed: int = 0
) -> dict[str, CategoryError]:
    """Over all harm, on the test images as they are and under each condition."""

    def shown(name: str) -> list[HarmExample]:
        if name == CLEAN:
            return list(test.examples)
        return [
            HarmExample(one.name, one.categories, under(name, one.open(), seed, number)) for number, one in enumerate(test.examples)
        ]

    return {name: measure_detector(detector, shown(name)).rows[0] for name in (CLEAN, *conditions)}


def balanced_accuracy(row: CategoryError) -> float | None:
    """Mean of sensitivity and specificity; None where one sort is missing."""
    if row.sensitivity is None or row.specificity is None:
        return None
    return (row.sensitivity + row.specificity) / 2


def pairs_hash(pairs: Sequence[ImagePair]) -> str:
    """SHA-256 over the pixels of all pairs, hex."""
    found = []
    for pair in pairs:
        images = [image for image in (pair.clean, pair.adverse) if image is not None]
        found.append(
            [pair.name, *(image.read_bytes().hex() if isinstance(image, Path) else image.tobytes().hex() for image in images)]
        )
    return hash_value(found)


def _card_of(kind: str, folder: Path, options: Mapping[str, Any], earlier: DetectorCard) -> DetectorCard:
    """The earlier card with the hash of the weights that were written."""
    from valign.detectors.clip_probe import ClipProbeDetector
    from valign.detectors.oracle import OracleDetector
    from valign.models.encoders.clip import ClipEncoder
    from valign.models.encoders.hyperbolic_clip import load_hyperbolic

    if kind == "hysac":
        found = load_hyperbolic(folder).weights_sha256
    elif kind == "clip-probe":
        encoder = ClipEncoder(str(options["encoder"]), adapters=[folder / name for name in options["adapters"]])
        found = ClipProbeDetector(folder, encoder=encoder).card.weights_sha256
    else:
        found = OracleDetector(folder).card.weights_sha256
    return replace(earlier, weights_sha256=found)
