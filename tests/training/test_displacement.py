from valign.training.engine.displacement import DisplacementMonitor


def levels(*ratios, window=4):
    alarm = DisplacementMonitor(warn=0.02, stop=0.2, window=window)
    return [alarm.update(ratio * 0.5, 0.5) for ratio in ratios]


def test_it_warns_after_one_whole_window():
    assert levels(0.05, 0.05, 0.05, 0.05) == ["ok", "ok", "ok", "warn"]


def test_it_stops_from_half_a_window_on():
    assert levels(0.5, 0.5) == ["ok", "stop"]


def test_one_bad_step_changes_no_level():
    assert levels(0.0, 0.0, 0.0, 0.07, 0.0) == ["ok"] * 5  # mean 0.0175


def test_falling_errors_never_alarm():
    assert set(levels(*[-0.9] * 10)) == {"ok"}


def test_the_level_falls_again():
    assert levels(*[0.1] * 4, *[-0.1] * 4)[3::4] == ["warn", "ok"]


def test_state_survives():
    alarm, other = DisplacementMonitor(window=3), DisplacementMonitor(window=3)
    for step in range(5):
        alarm.update(step / 7, 1.0)
    other.restore(alarm.state())
    assert other.ratio == alarm.ratio
    assert other.update(1.0, 1.0) == alarm.update(1.0, 1.0)
