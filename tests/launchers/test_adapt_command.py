"""launchers/adapt.py as people start it."""

import pytest
from launch import run_launcher
from saved_models import make_data, make_model


def test_an_expert_more_from_command_to_scores(tmp_path):
    data = make_data(tmp_path / "bin")
    demix = make_model(tmp_path / "demix", untie="feedforward", domains=["law", "code"])
    flags = ("--forest", demix, "--data", data, "--domain", "art", "--output_dir", tmp_path / "out")
    sizes = ("--max_steps", 2, "--per_device_train_batch_size", 1, "--prior_sequences", 2)
    done = run_launcher("adapt", *flags, *sizes, "--report_to", "none")
    assert done.returncode == 0, done.stderr
    assert "of the highest posterior" in done.stdout and "after adaptation" in done.stdout
    assert "Loading weights" not in done.stderr
    grown = tmp_path / "out" / "model"
    assert f"art is an expert of {grown}, with those it had" in done.stdout
    kept = (tmp_path / "out" / "run.yaml").read_text()
    assert "learning_rate: 5.0e-05  # default" in kept and "method: feedforward" in kept
    assert (tmp_path / "out" / "start.json").exists()
    done = run_launcher("verify", grown)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forest", "F", "--data", "D", "--output_dir", "O"], "--domain is missing"),
        (["--domain", "d", "--data", "D", "--output_dir", "O"], "--forest is missing, or --model"),
        (["--forest", "F", "--method", "dapt"], "'dapt' is not allowed"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(arguments, message):
    done = run_launcher("adapt", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("UserError: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
