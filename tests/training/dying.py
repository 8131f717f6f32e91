"""A training that dies after a step, for tests of going on."""

from contextlib import contextmanager

import pytest

from valign.training.engine.metrics import MetricsLog


class Killed(Exception):
    pass


@contextmanager
def killed_at(step, monkeypatch):
    """What runs inside must die once the log has this step."""
    append = MetricsLog.append

    def append_and_die(log, record):
        append(log, record)
        if record["step"] == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", append_and_die)
        with pytest.raises(Killed):
            yield
