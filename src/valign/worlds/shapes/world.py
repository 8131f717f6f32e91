"""The shapes world as one record."""

from pathlib import Path

from valign.detectors.oracle import OracleDetector
from valign.models.encoders.clip import ClipEncoder
from valign.worlds.base import World, WorldBudget
from valign.worlds.shapes import clip_folder, model_folder, oracle_folder
from valign.worlds.shapes.benign_tasks import TUNINGS, benign_data
from valign.worlds.shapes.contrast import HeadContrast
from valign.worlds.shapes.counterpart_tasks import counterpart_data, expert_data
from valign.worlds.shapes.glyph_tasks import glyph_data
from valign.worlds.shapes.grammar import Grammar
from valign.worlds.shapes.labelled import labelled_renders
from valign.worlds.shapes.measure import measure_model
from valign.worlds.shapes.quadruples import quadruples
from valign.worlds.shapes.sheet import contact_sheet
from valign.worlds.shapes.suite import canaries, reference_images, roles, suite
from valign.worlds.shapes.vocabulary import VERSION

ALL = 1000  # more than there are: a benign loss of a point is not seen on a few
SMALL = WorldBudget(pairs=24, steps=20, per_concept=1, search=30, value_images=1, value_steps=20, role_images=4)
QUICK = WorldBudget(pairs=80, steps=150, per_concept=6, search=ALL, value_images=8, value_steps=300, role_images=24)
FULL = WorldBudget(pairs=120, steps=200, per_concept=8, search=ALL, value_images=8, value_steps=300, role_images=50)


def _build(out: Path, *, seed: int = 0, share: float = 1.0, start: Path | None = None) -> None:
    from valign.worlds.shapes.build.world import build_world  # the training code is not needed elsewhere

    build_world(out, seed=seed, share=share, start=start)


def _oracle() -> OracleDetector:
    return OracleDetector(oracle_folder(), domain=SHAPES.origins)


SHAPES = World(
    name="shapes",
    version=VERSION,
    policy="shapes",
    grammar=Grammar,
    model_folder=model_folder,
    oracle=_oracle,
    clip=lambda: ClipEncoder(clip_folder()),
    contrast=HeadContrast,
    suite=suite,
    reference_images=reference_images,
    canaries=canaries,
    roles=roles,
    labelled=labelled_renders,
    quadruples=quadruples,
    tasks={
        "glyphs": glyph_data,
        "glyph-stream": glyph_data,
        "counterparts": counterpart_data,
        "expert": expert_data,
        **dict.fromkeys(TUNINGS, benign_data),
    },
    budgets={"small": SMALL, "quick": QUICK, "full": FULL},
    quick_categories=("hate", "violence", "shocking"),
    build=_build,
    sheet=contact_sheet,
    measure=measure_model,
    bars={"glyph": 0.92, "colour": 0.92},
)
