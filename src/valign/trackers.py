"""The experiment trackers that accelerate brings, checked without importing it."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec

from valign.checks import UserError, check_choice

PACKAGES = {  # of each tracker, any
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "mlflow": ("mlflow",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
}


def check_trackers(trackers: Iterable[str]) -> None:
    """Raises: UserError for one that accelerate does not know, or whose package is missing: it would be left out without a word."""
    own = registered()
    for name in trackers:
        if name in own:
            continue
        check_choice("--tracker", name, PACKAGES)
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise UserError(
                f"--tracker {name} needs the package {PACKAGES[name][0]}, which is missing: pip install {PACKAGES[name][0]}."
            )


def registered() -> set[str]:
    """Names of the trackers that the running program added by accelerate's ``register_tracker_class``."""
    tracking = sys.modules.get("accelerate.tracking")
    return set(tracking.LOGGER_TYPE_TO_CLASS) - set(PACKAGES) if tracking else set()
