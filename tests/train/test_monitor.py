import json
import logging
import math

import pytest
import torch

from megamod.states.checkpoint_folder import TrainState
from megamod.train import monitor as module
from megamod.train.monitor import Monitor, find_peak_flops, write_environment
from megamod.train.objectives import BatchScore


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    """The other rank has the same numbers as this one."""
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)


def scored(total, items, **further) -> BatchScore:
    further = {name: torch.tensor(pair) for name, pair in further.items()}
    return BatchScore(torch.tensor(0.0), torch.tensor(total), torch.tensor(items), further)


def monitor_in(folder, **options) -> Monitor:
    arguments = (
        dict(
            unit="tokens",
            max_steps=100,
            flops_per_token=1e6,
            peak_flops=1e9,
            report_to="none",
            first_step=0,
        )
        | options
    )
    return Monitor(folder, ("law", "med", "code"), **arguments)


def records(folder) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_sums_over_micro_batches_steps_and_ranks(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megamod")
    monitor, state = monitor_in(tmp_path), TrainState(step=2, tokens={"law": 5})
    monitor.add_step([scored([6.0, 0.0, 0.0], [2.0, 0.0, 0.0])] * 2, 0.5, 1e-3, 0.25, 1.0)
    monitor.add_step([scored([0.0, 9.0, 0.0], [0.0, 3.0, 0.0])], 0.75, 2e-3, 0.75, 2.0)
    monitor.write_record(state)
    (record,) = records(tmp_path)
    assert record["loss"] == pytest.approx((12 + 9) / (4 + 3))
    assert record["loss_by_domain"] == {"law": 3.0, "med": 3.0}  # nothing of code was seen
    assert state.tokens == {"law": 5 + 8, "med": 6, "code": 0}
    assert record["tokens"] == 19
    assert (record["grad_norm"], record["lr"], record["step"]) == (0.75, 2e-3, 2)
    assert (record["step_ms"], record["data_ms"]) == (1500.0, 500.0)
    # 14 tokens at 1e6 FLOP each on two devices of 1e9 FLOP/s
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 1e6 / 2e9)
    assert "step 2/100  loss 3.0000  lr 0.002  norm 0.75" in caplog.text
    assert not monitor.scored and monitor.steps == 0


def test_a_step_that_was_left_out_has_no_norm(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megamod")
    monitor = monitor_in(tmp_path, peak_flops=None)
    monitor.add_step([scored([6.0, 0.0, 0.0], [2.0, 0.0, 0.0])], None, 1e-3, 0.0, 1.0)
    monitor.write_record(TrainState(step=1, skipped=1))
    (record,) = records(tmp_path)
    assert (record["grad_norm"], record["skipped"], record["mfu"]) == (None, 1, None)
    assert "norm skipped" in caplog.text and "MFU n/a" in caplog.text


def test_a_resumed_run_forgets_what_it_makes_again(tmp_path):
    lines = [json.dumps({"step": step}) for step in (2, 4, 6, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10, "lo')
    monitor = monitor_in(tmp_path, first_step=5)
    monitor.log_scores(6, {"law": 7.5}, "valid")
    monitor.close()
    assert records(tmp_path) == [
        {"step": 2},
        {"step": 4},
        {"step": 6, "perplexity": {"law": 7.5}, "split": "valid"},
    ]


def test_damaged_lines_stop_no_run_and_are_kept_aside(tmp_path, caplog):
    damaged = b'[1]\n\xff\xfe\n{"step": "two"}\n' + b"[" * 100_000 + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2}\n' + damaged + b'{"step": 4}\n{"st')
    monitor_in(tmp_path, first_step=5).close()
    assert records(tmp_path) == [{"step": 2}, {"step": 4}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "4 damaged lines are moved to" in caplog.text


def test_a_repeated_evaluation_stands_once(tmp_path):
    """As after a kill between the evaluation and the next checkpoint."""
    first = monitor_in(tmp_path)
    for step in (4, 8):
        first.log_scores(step, {"law": float(step)}, "valid")
        first.log_scores(step, {"law": 0.5}, "valid", kind="accuracy")
    first.close()
    again = monitor_in(tmp_path, first_step=8)
    again.log_scores(8, {"law": 8.5}, "valid")
    again.close()
    assert records(tmp_path) == [
        {"step": 4, "perplexity": {"law": 4.0}, "split": "valid"},
        {"step": 4, "accuracy": {"law": 0.5}, "split": "valid"},
        {"step": 8, "accuracy": {"law": 0.5}, "split": "valid"},
        {"step": 8, "perplexity": {"law": 8.5}, "split": "valid"},
    ]


def test_a_closed_log_takes_nothing_more(tmp_path):
    monitor = monitor_in(tmp_path)
    monitor.close()
    with pytest.raises(ValueError, match="closed file"):
        monitor.log_scores(4, {"law": 4.0}, "valid")


def test_text_that_a_full_disk_refuses_is_reported_and_lost(tmp_path, caplog):
    monitor = monitor_in(tmp_path)
    monitor.metrics.close()
    with open("/dev/full", "a") as monitor.metrics:
        monitor.log_scores(4, {"law": 4.0}, "valid")
        monitor.close()
    assert caplog.text.count("metrics.jsonl: cannot be written: No space left on device") == 2


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = monitor_in(tmp_path, report_to="tensorboard")
    monitor.add_step([scored([6.0, 0.0, 0.0], [2.0, 0.0, 0.0])], 0.5, 1e-3, 0.0, 1.0)
    monitor.write_record(TrainState(step=3))
    monitor.log_scores(3, {"law": 20.0}, "valid")
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    expected = {
        "train/loss": 3.0,
        "train/loss/law": 3.0,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5,
        "valid/law/ppl": 20.0,
    }
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (3, pytest.approx(value))


def test_other_units_and_means_of_other_things(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megamod")
    monitor = monitor_in(tmp_path, unit="examples")
    rows = [
        scored([6.0, 0.0, 0.0], [2.0, 0.0, 0.0], right=[1.0, 4.0], unseen=[0.0, 0.0]),
        scored([2.0, 0.0, 0.0], [2.0, 0.0, 0.0], right=[5.0, 8.0], unseen=[0.0, 0.0]),
    ]
    monitor.add_step(rows, 0.5, 1e-3, 0.0, 1.0)
    monitor.write_record(TrainState(step=1))
    monitor.log_scores(1, {"cola": 0.25}, "dev", "matthews")
    trained, evaluated = records(tmp_path)
    assert trained["right"] == 6 / 12 and "unseen" not in trained
    assert trained["examples"] == 8 and trained["examples_per_second"] > 0
    assert evaluated == {"step": 1, "matthews": {"cola": 0.25}, "split": "dev"}
    assert "examples/s" in caplog.text and "dev matthews  cola 0.25" in caplog.text


def test_peaks_are_found_by_part_of_the_name():
    assert find_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert find_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert find_peak_flops("NVIDIA GeForce GTX 1080") is None


def test_the_environment_holds_versions_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    write_environment(tmp_path / "env.json")
    text = (tmp_path / "env.json").read_text()
    output = json.loads(text)
    assert output["versions"]["torch"] == torch.__version__
    assert output["variables"]["OMP_NUM_THREADS"] == "3"
    assert "secret" not in text
    assert not math.isnan(output["cpus"])
