"""Every tuned build, compiled for two generations of GPUs without one.

Builds whose kernel, settings and Triton are those of builds.json are not compiled again. After a
change of kernels renew it, or each run of the suite compiles them:

    python -m megamod_kernels.compile_ahead --reuse tests/kernels/builds.json \\
      --json tests/kernels/builds.json
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from megamod_kernels.builds import BUILDS
from megamod_kernels.compile_ahead import SHARED_LIMIT, list_faults, main

KEPT = Path(__file__).with_name("builds.json")


@pytest.mark.slow
def test_every_tuned_build_fits_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-m", "megamod_kernels.compile_ahead"]
    done = subprocess.run(
        [*command, "--reuse", str(KEPT), "--json", str(tmp_path / "builds.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "builds.json").read_text())
    assert {row["capability"] for row in rows} == set(SHARED_LIMIT)
    names = {row["build"] for row in rows}
    starts = ("multiplex_", "mux_embed_", "mux_qkv_", "instance_attention_", "keyed_", "norm_")
    for start in (*starts, "rsa_demux_"):
        assert any(name.startswith(start) for name in names), start
    for row in rows:
        assert row["stack"] == row["spills"] == 0 and 0 < row["registers"] <= 255, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row


ONES = """
from megamod_kernels.builds import BUILDS
from megamod_kernels.compile_ahead import list_builds, find_refused_arguments
found = {}
for build in list_builds(BUILDS):
    flags = [value for value in build.constants.values() if isinstance(value, bool)]
    found.setdefault((build.kernel.__name__, *flags), build)
for build in found.values():
    print(build.name, find_refused_arguments(build))
"""


@pytest.mark.long  # compiles every kernel
def test_kernels_can_be_launched_where_a_number_is_one():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", ONES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 20 and all(line.endswith("[]") for line in lines), done.stdout


def test_an_unknown_operation_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_ahead", "rsa_demux"])
    with pytest.raises(SystemExit) as exit_:
        main()
    message = "'rsa_demux' is no operation with kernels; there are mux, mux_embed"
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_faults_are_told():
    good = {"registers": 100, "stack": 0, "spills": 0, "shared": 1024}
    assert list_faults(good, 90) == [] and "demux" in BUILDS
    assert list_faults({**good, "spills": 16}, 80) == ["16 bytes of spills"]
    message = "170000 bytes of shared memory, the limit is 166912"
    assert list_faults({**good, "shared": 170_000}, 80) == [message] and not list_faults(
        {**good, "shared": 170_000}, 90
    )
