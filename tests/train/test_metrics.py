"""metrics.jsonl survives kills, and a resumed run goes on where its checkpoint was."""

from lcjax.observe.metrics import MetricsLog, plot_loss, read_metrics


def write(folder, steps, **options):
    log = MetricsLog(folder, tensorboard=False, **options)
    for step in steps:
        log.write(step, {"loss": 1.0 / step})
    log.close()
    return [line["step"] for line in read_metrics(log.path)]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    assert write(tmp_path, range(1, 8)) == [1, 2, 3, 4, 5, 6, 7]
    assert write(tmp_path, [5, 6], resumed_at=4) == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert write(tmp_path, [3], resumed_at=2) == [1, 2, 3]


def test_values_that_are_not_finite_are_null_and_not_plotted(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"loss": float("nan")})
    log.write(2, {"loss": 2.0})
    log.close()
    assert read_metrics(log.path)[0]["loss"] is None
    plot_loss(log.path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
