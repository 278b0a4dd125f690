import json
import os
import subprocess
import sys

import pytest
import torch
from ranks import on_ranks

from megamod.dist import process


def exchange(rank: int) -> dict[str, object]:
    texts = ["ä" * 200, ""]
    return dict(
        rank=process.rank(),
        world=process.world_size(),
        both=process.everywhere(True),
        one=process.everywhere(rank == 0),
        number=process.from_rank_0(2**52 + 1 if rank == 0 else 7),
        texts=process.gather_text(texts[rank]),
        control=str(process.control([1.0]).dtype),
        backend=torch.distributed.get_backend(),
    )


@pytest.mark.slow
def test_two_ranks_tell_each_other():
    told = on_ranks(2, exchange)
    for rank, of in enumerate(told):
        assert (of["rank"], of["world"], of["backend"]) == (rank, 2, "gloo")
        assert (of["both"], of["one"]) == (True, False)
        assert of["number"] == 2**52 + 1
        # 255 bytes of text: 127 letters of two bytes and half of one.
        assert of["texts"] == ["ä" * 127 + "\ufffd", ""]
        assert of["control"] == "torch.float64"


def test_without_a_group_the_process_is_alone():
    assert not torch.distributed.is_initialized()
    assert (process.rank(), process.world_size()) == (0, 1)


@pytest.mark.slow
def test_plain_python_is_a_world_of_one():
    program = (
        "import json, os\n"
        "from megamod.dist.process import everywhere, init_process, rank, world_size\n"
        "device = init_process(timeout=60)\n"
        "told = [str(device), rank(), world_size(), everywhere(True), os.environ['LOCAL_RANK']]\n"
        "print(json.dumps(told))\n"
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
