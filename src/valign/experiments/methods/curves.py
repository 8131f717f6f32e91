"""How fast does a training take harm away? Checkpoints of plain DPO and of LiVO, sampled and judged; a part of `bench_methods`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from valign.detectors.base import flagged
from valign.evaluation.images.folder import make_images
from valign.evaluation.report.plots import Frame, Plot, curves, round_up
from valign.evaluation.report.sections import Section
from valign.evaluation.suite import Suite
from valign.evaluation.systems import System
from valign.files import atomic_folder, read_json
from valign.interfaces import Detector, SamplingConfig, scores_of
from valign.training.engine.checkpoint import Checkpoints
from valign.training.tasks.preference.trainable import TrainableAdapter

HARM = "Harmful images of explicit prompts, %"


@dataclass(frozen=True)
class CurvePoint:
    """Harm in per cent after so many optimizer steps and seconds of training."""

    step: int
    seconds: float
    harm: float


def convergence(
    trainable: TrainableAdapter,
    run: Path,
    every: int,
    system: Callable[[Path], System],
    suite: Suite,
    detector: Detector,
    out: Path,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
) -> list[CurvePoint]:
    """The curve of the training in ``run``: each checkpoint at a multiple of ``every``, and the last, sampled by ``system``.

    Args:
        trainable: As the run was trained with; what it saves for a checkpoint is what ``system`` gets.
        out: For the checkpoints' results and their images.
    """
    checkpoints = Checkpoints(run / "checkpoints")
    last = max(checkpoints.steps())
    steps = [step for step in checkpoints.steps() if step % every == 0 or step == last]
    _save(trainable, checkpoints, [step for step in steps if not (out / f"step-{step}").exists()], out)
    settings: dict[str, object] = {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    points = []
    for step in steps:
        shown = system(trainable.result(out / f"step-{step}"))
        folder = make_images(
            shown, suite, suite.seeds(seed), out / f"images-{step}", settings=settings, batch_size=sampling.batch_size
        )
        images = [image for prompt in suite.prompts if (image := folder.open(prompt.id)) is not None]
        harm = flagged(scores_of(detector, images), detector.card).sum() / len(suite)
        points.append(CurvePoint(step, read_json(checkpoints.path(step) / "state.json")["seconds"], 100 * float(harm)))
    return points


def _save(trainable: TrainableAdapter, checkpoints: Checkpoints, steps: Sequence[int], out: Path) -> None:
    """Write each step's result into ``out/step-N``, as a finished run does."""
    if not steps:
        return
    trainable.attach()
    trainable.start(None, None)
    try:
        for step in steps:
            checkpoints.load(step, trainable.state())
            with atomic_folder(out / f"step-{step}") as folder:
                trainable.save(folder, {"step": step})
    finally:
        trainable.detach()


def mean_curve(runs: Sequence[Sequence[CurvePoint]], start: float) -> list[CurvePoint]:
    """Point by point over runs, as far as all go; before it, ``start`` per cent at step 0."""
    points = [
        CurvePoint(
            round(np.mean([point.step for point in column])),
            float(np.mean([point.seconds for point in column])),
            float(np.mean([point.harm for point in column])),
        )
        for column in zip(*runs)
    ]
    return [CurvePoint(0, 0.0, start), *points]


def curves_section(found: Mapping[str, Sequence[CurvePoint]]) -> Section:
    """Harm against steps and against seconds."""
    plots = []
    for title, value in (("Optimizer steps", "step"), ("Seconds of training", "seconds")):
        series = {name: [(float(getattr(point, value)), point.harm) for point in points] for name, points in found.items()}
        end = round_up(max(x for points in series.values() for x, _ in points))
        plots.append(Plot(curves(series, Frame(title, HARM, (0.0, end), (0.0, 100.0))), "Mean over runs."))
    rows = tuple((name, " → ".join(f"{p.harm:.0f} % at {p.step}" for p in points)) for name, points in found.items())
    return Section(
        title="Convergence",
        text="Harm left after so many steps, and seconds, of training.",
        header=("harm left at step",),
        rows=rows,
        plots=tuple(plots),
        note="Seconds are those of training steps alone, on this machine; data, validation and sampling are left out.",
    )
