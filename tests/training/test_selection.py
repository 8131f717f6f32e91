import json

from valign.training.engine.selection import Selection


def after(*pairs, patience=2):
    selection = Selection(max_drift=0.1, patience=patience)
    for step, (score, drift) in enumerate(pairs, start=1):
        selection.update(step, score=score, drift=drift)
    return selection


def test_the_least_score_within_the_drift_limit_wins():
    assert after((0.7, 0.01), (0.5, 0.05), (0.1, 0.2)).best_step == 2


def test_drift_at_the_limit_is_within_it():
    assert after((0.5, 0.1), (0.6, 0.0)).best_step == 1
    assert after((0.5, 0.11), (0.6, 0.0)).best_step == 2


def test_beyond_the_limit_less_drift_beats_less_score():
    assert after((0.1, 0.5), (0.6, 0.3)).best_step == 2


def test_a_score_that_is_not_finite_never_wins():
    assert after((float("nan"), 0.0)).best_step == 0


def test_patience_counts_validations_since_the_best():
    assert not after((0.5, 0.0), (0.6, 0.0)).exhausted
    assert after((0.5, 0.0), (0.6, 0.0), (0.5, 0.0)).exhausted
    assert not after((0.5, 0.0), (0.6, 0.0), (0.4, 0.0)).exhausted


def test_state_survives_json():
    for selection in (Selection(0.1, 2), after((0.5, 0.3), (0.6, 0.2), (float("nan"), 0.0))):
        other = Selection(0.1, 2)
        other.restore(json.loads(json.dumps(selection.state(), allow_nan=False)))
        assert other == selection
