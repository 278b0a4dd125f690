"""The whole way over two hosts: started by pdsh and ssh or by hand, killed in the midst, resumed.

The hosts are simulated (hosts.py); ssh, pdsh and DeepSpeed's launcher are the real ones. Whatever
is trained on two hosts must have the tensors of the same world on one, bit for bit.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import ADDRESSES, NAMES, TwoHosts, missing, two_hosts
from ranks import free_port
from safetensors.torch import load_file

from megamod.btm.jobs import kill_processes
from megamod.data.corpus.binarize import binarize

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN, BTM = (str(REPOSITORY / "launchers" / name) for name in ("pretrain.py", "btm.py"))
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
RECIPE = """
model: tiny
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
max_steps: 4
per_device_train_batch_size: 2
global_batch_size: 4
logging_steps: 2
save_steps: 2
eval_batches: 1
max_seq_length: 32
learning_rate: 3.0e-3
report_to: none
"""
UNTIE = {"dense": "none", "demix": "feedforward"}
LONGEST = 500

pytestmark = pytest.mark.long  # dozens of processes that each import everything
over_ssh = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a data-bin of two domains and a recipe."""
    root = tmp_path_factory.mktemp("hosts")
    draw = random.Random(0)
    texts = {
        domain: [" ".join(draw.choices([domain + c for c in "abcdefgh"], k=40)) for _ in range(200)]
        for domain in ("law", "med")
    }
    binarize(texts, "sentencepiece:300", root / "bin")
    (root / "recipe.yaml").write_text(RECIPE + f"data: {root / 'bin'}\n")
    return root


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts."""
    with two_hosts(tmp_path_factory.mktemp("ssh") / "hosts") as started:
        yield started


def begin(command, output: Path, environment: dict[str, str] | None = None):
    """Start a program; what it writes goes to OUTPUT.txt."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in (environment or os.environ).items() if k not in left_out}
    with open(f"{output}.txt", "a") as log:
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env={**kept, "PYTHONWARNINGS": "ignore"},
        )


def finish(process: subprocess.Popen, output: Path) -> str:
    """Wait for its success; returns what it wrote."""
    try:
        code = process.wait(LONGEST)
    finally:
        process.kill()
    message = Path(f"{output}.txt").read_text()
    assert code == 0, message[-4000:]
    return message


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a file of a running program is there."""
    deadline = time.monotonic() + LONGEST
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def flags(folder: Path, output: Path, kind: str, *more: object) -> list[object]:
    return [folder / "recipe.yaml", "--untie", UNTIE[kind], "--output_dir", output, *more]


def published_weights(output: Path) -> dict[str, str]:
    """Digests of all tensors below a folder; metadata of a file have no order."""
    result = {}
    for file in sorted(output.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            result[f"{file.relative_to(output)} {name}"] = hashlib.sha256(raw).hexdigest()
    assert result
    return result


def on_one_host(folder: Path, kind: str, *more: object) -> dict[str, str]:
    """Run two ranks on one host, once a session."""
    output = folder / "-".join(map(str, ("one", kind, *more)))
    if not output.exists():
        command = (*TORCHRUN, "--master_port", free_port(), PRETRAIN)
        finish(begin([*command, *flags(folder, output, kind, *more)], output), output)
    return published_weights(output)


def without_ssh(folder: Path, kind: str) -> Path:
    """Train with a launcher started by hand on each host; once a session."""
    output = folder / f"by-hand-{kind}"
    if not output.exists():
        (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        common = ("--hostfile", folder / "hosts", "--no_ssh", "--master_addr", "127.0.0.1")
        common += ("--master_port", free_port())
        started = [
            begin(
                [*DEEPSPEED, *common, "--node_rank", node, PRETRAIN, *flags(folder, output, kind)],
                output,
                {**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            )
            for node in range(2)
        ]
        for process in started:
            finish(process, output)
    return output


def test_without_ssh_each_host_holds_a_domain(folder):
    output = without_ssh(folder, "demix")
    rows = [line.split() for line in Path(f"{output}.txt").read_text().splitlines()]
    table = [(row[0], row[3], row[5]) for row in rows if len(row) == 6 and row[2] == "cpu"]
    assert table == [("0", "law", "0"), ("1", "med", "1")]
    # Both launchers are on this machine, so their lines are in one file, whole.
    (log,) = (output / "logs").iterdir()
    lines = log.read_text().splitlines()
    assert sum("begins at step 0" in line for line in lines) == 2
    assert sum("is done after" in line for line in lines) == 2
    assert sum("step 4/4  loss" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNTIE)
def test_without_ssh_the_weights_are_those_of_one_host(folder, kind):
    assert published_weights(without_ssh(folder, kind)) == on_one_host(folder, kind)


class TestOverSsh:
    pytestmark = over_ssh

    def command(self, hosts: TwoHosts) -> list[object]:
        result = [*DEEPSPEED, "--hostfile", hosts.hostfile, "--master_addr", ADDRESSES[0]]
        return [*result, "--master_port", free_port(), PRETRAIN]

    def test_the_hostfile_is_checked_by_logging_in(self, hosts, tmp_path):
        check = [sys.executable, str(REPOSITORY / "launchers" / "check_hostfile.py")]
        good = subprocess.run(
            [*check, hosts.hostfile, "--experts", "2"],
            capture_output=True,
            text=True,
            env=hosts.environment,
        )
        assert good.returncode == 0, good.stderr
        rows = [line.split() for line in good.stdout.splitlines()[1:]]
        assert [row[:2] + row[3:] for row in rows] == [
            [address, "1", "s", str(rank), str(rank)] for rank, address in enumerate(ADDRESSES)
        ]
        (tmp_path / "hosts").write_text(f"{ADDRESSES[0]} slots=1\n127.0.0.4 slots=1\n")
        bad = subprocess.run(
            [*check, tmp_path / "hosts"], capture_output=True, text=True, env=hosts.environment
        )
        assert bad.returncode == 2 and bad.stderr.count("line ") == 1
        assert "line 2: 127.0.0.4: ssh says 'ssh: connect to host 127.0.0.4 port" in bad.stderr

    @pytest.mark.parametrize("kind", UNTIE)
    def test_the_weights_are_those_of_one_host(self, folder, hosts, kind):
        output = folder / f"two-{kind}"
        process = begin(
            [*self.command(hosts), *flags(folder, output, kind)], output, hosts.environment
        )
        message = finish(process, output)
        assert published_weights(output) == on_one_host(folder, kind)
        # pdsh puts the address of its host in front of each line.
        rows = [line.split()[1:] for line in message.splitlines()]
        domains = {"dense": ("law,med", "law,med"), "demix": ("law", "med")}[kind]
        for rank, name in enumerate(NAMES):
            assert [str(rank), name, "cpu", domains[rank]] in [row[:4] for row in rows]
            log = (output / "logs" / f"{name}.log").read_text()
            assert f"rank {rank} of 2" in log and "is done after" in log
            assert ("step 4/4  loss" in log) is (rank == 0)

    def test_a_host_dies_and_the_same_command_goes_on(self, folder, hosts):
        more = ("--max_steps", 60, "--save_steps", 10, "--save_total_limit", 2)
        cut, command = folder / "cut", self.command(hosts)
        process = begin([*command, *flags(folder, cut, "dense", *more)], cut, hosts.environment)
        wait_for(cut / "checkpoints" / "step-10", process)
        assert hosts.hit(1) > 1
        killed = time.monotonic()
        assert process.wait(120) in (4, 255)  # of the rank that is left, or of the ssh that was cut
        seconds = time.monotonic() - killed
        message = Path(f"{cut}.txt").read_text()
        assert "DistributedFailure: rank 0 on host-2 lost its peers" in message, message[-3000:]
        assert seconds < 45, f"{seconds} s"
        assert not (cut / "model").exists()
        assert "rank 0 ended after" in (cut / "logs" / "host-2.log").read_text()

        finish(begin([*command, *flags(folder, cut, "dense", *more)], cut, hosts.environment), cut)
        for name in NAMES:  # appended to, not begun anew
            log = (cut / "logs" / f"{name}.log").read_text()
            assert log.count("begins at step") == 2 and log.count("begins at step 0") == 1
        assert published_weights(cut) == on_one_host(folder, "dense", *more)

    def test_a_host_that_freezes_does_not_hold_the_others_for_ever(self, folder, hosts):
        more = ("--max_steps", 5000, "--save_steps", 10, "--dist_timeout", 10)
        output = folder / "frozen"
        # The ssh client of the frozen host ends only if it is told to look whether it is there.
        alive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
        environment = {**hosts.environment, "PDSH_SSH_ARGS_APPEND": alive}
        command = [*self.command(hosts), *flags(folder, output, "dense", *more)]
        process = begin(command, output, environment)
        wait_for(output / "checkpoints" / "step-10", process)
        assert hosts.hit(1, signal.SIGSTOP) > 1
        try:
            assert process.wait(120) in (4, 255)
        finally:
            process.kill()
            hosts.hit(1)
            hosts.hit(0)
        message = Path(f"{output}.txt").read_text()
        assert "DistributedFailure: rank 0 on host-2 lost its peers" in message, message[-3000:]

    def test_an_expert_on_each_host(self, folder, hosts):
        outputs = folder / "btm-one", folder / "btm-two"
        runs = [("--slots", "2"), ("--hostfile", hosts.hostfile)]
        for output, where in zip(outputs, runs, strict=True):
            command = (sys.executable, BTM, folder / "recipe.yaml", "--seed_share", "0.5", *where)
            process = begin([*command, "--output_dir", output], output, hosts.environment)
            try:
                finish(process, output)
            finally:  # jobs outlive a driver that is killed
                for lock in (output / "jobs").glob("*.lock"):
                    kill_processes(str(lock.resolve()))
        assert published_weights(outputs[0]) == published_weights(outputs[1])
        logs = sorted(path.name for path in (outputs[1] / "experts").glob("*/logs/*"))
        assert logs == [f"{name}.log" for name in NAMES]
