import json
import os
import subprocess
import sys

import pytest
import torch
from ranks import WAIT, free_port, on_ranks

from megamod.dist import process
from megamod.errors import UserError


def exchange(rank: int) -> dict[str, object]:
    group = torch.distributed.new_group([0, 1])
    texts = ["ä" * 200, ""]
    return dict(
        rank=process.get_rank(),
        world=process.get_world_size(),
        both=process.is_true_on_all_ranks(True),
        one=process.is_true_on_all_ranks(rank == 0),
        number=process.broadcast_from_rank_0(2**52 + 1 if rank == 0 else 7),
        texts=process.gather_texts(texts[rank]),
        control=str(process.make_tensor_for_collectives([1.0]).dtype),
        backend=torch.distributed.get_backend(),
        patience=group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
    )


@pytest.mark.slow
def test_two_ranks_exchange_values():
    answers = on_ranks(2, exchange)
    for rank, of in enumerate(answers):
        assert (of["rank"], of["world"], of["backend"]) == (rank, 2, "gloo")
        assert (of["both"], of["one"]) == (True, False)
        assert of["number"] == 2**52 + 1
        # 255 bytes of text: 127 letters of two bytes and half of one.
        assert of["texts"] == ["ä" * 127 + "\ufffd", ""]
        assert of["control"] == "torch.float64"
        assert of["patience"] == WAIT  # of groups that others make too


def test_without_a_group_the_process_is_alone():
    assert not torch.distributed.is_initialized()
    assert (process.get_rank(), process.get_world_size()) == (0, 1)


@pytest.mark.slow
def test_plain_python_is_one_rank():
    program = (
        "import json, os\n"
        "from megamod.dist import process\n"
        "device = process.join_process_group(timeout_seconds=60)\n"
        "facts = [str(device), process.get_rank(), process.get_world_size()]\n"
        "facts += [process.is_true_on_all_ranks(True), os.environ['LOCAL_RANK']]\n"
        "print(json.dumps(facts))\n"
    )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["cpu", 0, 1, True, "0"]


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FOREIGN = ("OMPI_", "PMI_", "MPI_", "SLURM_", "TORCHELASTIC_", "CROSS_")


def srun(rank: int, world: int, local: int, **more: str) -> dict[str, str]:
    fields = dict(SLURM_PROCID=str(rank), SLURM_NTASKS=str(world), SLURM_LOCALID=str(local))
    return {**fields, **more}


def mpirun(rank: int, world: int, local: int, **more: str) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK")
    fields = {
        f"OMPI_COMM_WORLD_{n}": str(v) for n, v in zip(names, (rank, world, local), strict=True)
    }
    return {**fields, **more}


def launched(rank: int, world: int, local: int, **more: str) -> dict[str, str]:
    return dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local), **more)


@pytest.fixture
def variables(monkeypatch):
    """Set variables in an environment without those of launchers."""
    for name in list(os.environ):
        if name in LAUNCHED or name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    # What the function sets itself goes away with the copy.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return os.environ.update


MEET = dict(MASTER_ADDR="node-1")
STEP = dict(SLURM_JOB_ID="7", SLURM_STEP_ID="0")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        (launched(3, 8, 1), (3, 8, 1)),
        (srun(9, 16, 1, **MEET), (9, 16, 1)),
        (srun(9, 16, 1, **MEET, **STEP), (9, 16, 1)),
        (srun(0, 1, 0), None),
        (srun(0, 16, 0, SLURM_JOB_ID="7", **MEET), None),  # the batch script itself
        (mpirun(5, 8, 1, **MEET), (5, 8, 1)),
        (mpirun(0, 1, 0), None),
        (dict(PMI_RANK="2", PMI_SIZE="4", MPI_LOCALRANKID="0", **MEET), (2, 4, 0)),
        (mpirun(5, 8, 1, **MEET, **srun(1, 2, 0), **STEP), (5, 8, 1)),  # mpirun by way of srun
        (launched(9, 16, 1, CROSS_RANK="1") | srun(1, 2, 0, **STEP), (9, 16, 1)),  # deepspeed in it
        (launched(0, 1, 0, TORCHELASTIC_RUN_ID="x") | mpirun(0, 1, 0), (0, 1, 0)),
        (launched(9, 16, 1) | srun(9, 16, 1, **STEP), (9, 16, 1)),
    ],
)
def test_ranks_of_launchers(variables, environment, rank):
    variables(environment)
    for _ in range(2):  # the second time changes nothing
        process.set_rank_variables()
        if rank is None:
            assert "RANK" not in os.environ
        else:
            assert tuple(int(os.environ[name]) for name in LAUNCHED[:3]) == rank
    assert os.environ.get("MASTER_ADDR") == environment.get("MASTER_ADDR")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (srun(9, 16, 1), "SLURM_NTASKS=16 of srun, but MASTER_ADDR is not set"),
        (mpirun(5, 8, 1), "OMPI_COMM_WORLD_SIZE=8 of Open MPI, but MASTER_ADDR is not set"),
        (dict(RANK="1"), "RANK is set by the launcher, but WORLD_SIZE is not set"),
        (dict(SLURM_PROCID="1", SLURM_NTASKS="2"), "but SLURM_LOCALID is not set"),
        (dict(OMPI_COMM_WORLD_RANK="1"), "but OMPI_COMM_WORLD_SIZE is not set"),
        (launched(8, 8, 0), "RANK=8 and LOCAL_RANK=0 must be below WORLD_SIZE=8"),
        (srun(1, 2, 2, **MEET), "SLURM_LOCALID=2 must be below SLURM_NTASKS=2"),
        (dict(RANK="one", WORLD_SIZE="2"), "RANK is 'one'"),
        (launched(0, 1, 0) | srun(3, 4, 3, **STEP), "contradict SLURM_PROCID=3 and SLURM_NTASKS=4"),
        (launched(0, 4, 0) | mpirun(3, 4, 3), "RANK=0 and WORLD_SIZE=4 contradict OMPI_COMM_WORLD"),
    ],
)
def test_wrong_variables_are_refused(variables, environment, message):
    variables(environment)
    before = dict(os.environ)
    with pytest.raises(UserError, match=message):
        process.set_rank_variables()
    assert dict(os.environ) == before


def test_ranks_without_the_others_are_refused(variables):
    process.check_launcher_variables()
    variables(dict(SLURM_NTASKS="8"))
    with pytest.raises(UserError, match="SLURM_NTASKS is 8, but this process was not started by"):
        process.check_launcher_variables()
    variables(launched(0, 2, 0, MASTER_ADDR="a"))
    with pytest.raises(UserError, match="RANK is 0, but MASTER_PORT is not set"):
        process.check_launcher_variables()


def test_a_host_with_too_few_devices():
    process.check_device(7, 8)
    with pytest.raises(UserError, match="sees 8 devices: the hostfile gives it too many"):
        process.check_device(8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [srun, mpirun])
def test_ranks_of_other_launchers_meet(kind):
    program = (
        "from megamod.dist.process import gather_texts, join_process_group, get_rank\n"
        "join_process_group(timeout_seconds=60)\n"
        "print(*gather_texts(f'rank {get_rank()}'), sep=', ')\n"
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHED and not name.startswith(FOREIGN)
    }
    meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**kept, **kind(number, 2, number, **meet)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for member in started:
        output, _ = member.communicate(timeout=120)
        assert (member.returncode, output.splitlines()[-1]) == (0, "rank 0, rank 1")
