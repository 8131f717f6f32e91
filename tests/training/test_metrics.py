from valign.training.engine.metrics import MetricsLog


def test_lines_come_back_and_rewind_forgets_later_steps(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert log.read() == []
    log.rewind(0)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1 / 3})
    log.rewind(2)
    assert log.read() == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1 / 3}]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert log.read() == [{"step": 1}]
    log.rewind(5)
    log.append({"step": 2})
    assert [line["step"] for line in log.read()] == [1, 2]
