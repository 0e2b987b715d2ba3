"""What is read of a run's folder: all that is there, and of a damaged one what is whole."""

import json
import shutil

import pytest

from trl_tafs.report.charts import charts
from trl_tafs.report.facts import settings, status, times
from trl_tafs.report.pictures import spread, strip
from trl_tafs.report.run import read_metrics, read_run
from trl_tafs.report.write import report_of_run, write_report


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_numbers_are_the_logs(trained):
    run = read_run(trained)
    rewards = {line["epoch"]: line["reward"] for line in lines(trained) if "reward" in line}
    assert run.curves["reward"] == rewards and list(rewards) == [0, 1, 2]
    held_out = {
        line["epoch"]: line["eval/annealed_4/judge"] for line in lines(trained) if "eval/annealed_4/judge" in line
    }
    assert run.curves["eval/annealed_4/judge"] == held_out and list(held_out) == [0, 1, 2, 3]
    assert (run.name, run.finished, run.epochs, status(run)) == ("first", True, 3, "finished, 3 epochs")
    assert list(run.pictures) == [0, 1, 2, 3] and len(run.prompts) == 2 and run.base == "tiny-sd3"


def test_several_steps_of_an_epoch_are_their_mean(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"epoch": 0, "loss": 1.0}\n{"epoch": 0, "loss": 3.0}\n{"epoch": 1, "loss": null}\n{"epoch": 0, "lo')
    assert read_metrics(log)[0] == {"loss": {0: 2.0}}


def test_a_pause_is_no_time_of_the_run(tmp_path):
    log = tmp_path / "metrics.jsonl"
    times = [*range(0, 300, 3), *range(100_000, 100_300, 3)]
    log.write_text("".join(json.dumps({"epoch": i, "reward": 0.5, "time": t}) + "\n" for i, t in enumerate(times)))
    assert read_metrics(log)[1] == pytest.approx(3 * 198)


def test_all_curves_that_are_asked_for_have_a_chart(trained):
    titles = [chart.title for chart in charts([read_run(trained)])]
    expected = {"Reward", "Reward by step", "Reward: bright", "Held out: judge", "Distance to the base (KL)"}
    expected |= {"Clipped ratios, by the advantage's sign", "Deviation within groups", "Images: saturated pixels"}
    assert expected <= set(titles)
    by_title = {chart.title: chart for chart in charts([read_run(trained)])}
    assert [series.label for series in by_title["Reward by step"].series] == ["step 2", "step 3", "step 4"]
    assert [s.dashed for s in by_title["Images: sharpness"].series] == [False, True, True], "with the range before"
    data = by_title["Held out: judge"].data()
    assert data["data"][0] == [0, 1, 2, 3] and len(data["data"]) == len(data["series"]) + 1 == 3


def test_runs_of_other_lengths_share_their_epochs(trained, run):
    kept = [line for line in lines(run) if line["epoch"] < 1]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    chart = charts([read_run(trained), read_run(run)])[0]
    epochs, first, second = chart.data()["data"]
    assert epochs == [0, 1, 2] and None not in first and second[0] == first[0] and second[1:] == [None, None]


def test_settings_are_those_that_differ(trained, run):
    rows = {row["name"]: row for row in settings([read_run(trained)])}
    assert rows["train_learning_rate"]["values"] == ["0.02"] and rows["train_learning_rate"]["default"] == "0.0003"
    assert "sample_num_steps" not in rows and "run_name" not in rows and "train_adam_beta1" not in rows
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"beta": 0.5}))
    rows = {row["name"]: row for row in settings([read_run(trained), read_run(run)])}
    assert rows["beta"]["differ"] and rows["beta"]["values"] == ["0.1", "0.5"] and not rows["lora_rank"]["differ"]


def test_time_is_the_phases_against_the_floor(trained):
    run, found = read_run(trained), times(read_run(trained))
    assert [bar["name"] for bar in found["bars"]] == ["rollout", "decode", "reward", "update"]
    phases = sum(sum(run.curves[f"time/{name}"].values()) / 3 for name in ("rollout", "decode", "reward", "update"))
    assert float(found["total"]) == pytest.approx(phases, rel=0.01)
    floors, rollouts = run.curves["time/floor"], run.curves["time/rollout"]
    assert floors[0] >= rollouts[0], "the first epoch's rollout is the fastest so far, and an update is more work"


def test_pictures_are_few_and_first_and_last_are_among_them(trained):
    assert spread(list(range(1000)), 24)[0] == 0 and spread(list(range(1000)), 24)[-1] == 999
    assert len(spread(list(range(1000)), 24)) == 24 and spread([3, 4], 24) == [3, 4]
    shown = strip(read_run(trained))
    assert shown["epochs"] == [0, 1, 2, 3] and [len(images) for images in shown["images"]] == [2] * 4
    assert shown["images"][0] != shown["images"][-1]


def damage_nothing(run):
    pass


def damage_log(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text) // 2] + "\nnull\n[1]\n\xff\n")


def damage_pictures(run):
    (run / "pictures" / "epoch_000001" / "0.png").write_bytes(b"\x89PNG torn")
    shutil.rmtree(run / "pictures" / "epoch_000002")


def leave_log_alone(run):
    for path in run.iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty_log(run):
    leave_log_alone(run)
    (run / "metrics.jsonl").write_text("")


def without_evaluation(run):
    kept = [line for line in lines(run) if "eval/annealed_2/judge" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def other_version(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"no_such_option": 1}))


DAMAGES = [damage_nothing, damage_log, damage_pictures, leave_log_alone, empty_log, without_evaluation, other_version]


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_run_has_a_report(run, damage, tmp_path):
    damage(run)
    page = write_report([run, run], tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")


def test_an_interrupted_run_says_so(run):
    shutil.rmtree(run / "adapter")
    kept = [line for line in lines(run) if line["epoch"] < 2]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert status(read_run(run)) == "not finished, 2 epochs of 3"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run's folder: it has no metrics.jsonl"):
        write_report([tmp_path], tmp_path / "report.html")


def test_a_report_that_cannot_be_written_is_a_warning(run, caplog):
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    (run / "report.html" / "file").touch()
    assert report_of_run(run) is None
    assert "can't be written" in caplog.text and f"trl-tafs report {run}" in caplog.text
