"""Benchmarks of whole models on a GPU, rehearsed on a CPU with tiny ones."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "kernels" / "bench"), str(REPOSITORY / "tests" / "bench")]

import gpu  # noqa: E402
import gpu_inference  # noqa: E402
import gpu_peer  # noqa: E402
import gpu_report  # noqa: E402
import gpu_training  # noqa: E402
from clock import MachineSpeed  # noqa: E402
from gpu_steps import Job, Size  # noqa: E402

MACHINE_SPEED = MachineSpeed("a device", 1e9, 1e12, "some software")
LAYERS, WIDTH, WIDE, LENGTH = 2, 32, 64, 16
SHAPE = {
    **{"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 2},
    "intermediate_size": WIDE,
}
FLAGS = ("--vocab_size", "512", "--hidden_size", "32", "--num_hidden_layers", "2")
FLAGS += ("--num_attention_heads", "2")
TINY = Size("tiny", 2, 2, 0.1, length=LENGTH, more=FLAGS)


def test_operations_against_a_count_by_hand():
    blocks = LAYERS * (2 * LENGTH * (4 * WIDTH**2 + 2 * WIDTH * WIDE) + 4 * LENGTH**2 * WIDTH)
    labels = 2 * WIDTH * gpu_inference.make_stock("token", SHAPE).config.num_labels
    with torch.device("meta"):
        models = {
            (kind, n): gpu_inference.make(kind, SHAPE, n)
            for kind, n in (("token", 1), ("sequence", 1), ("token", 5))
        }
    result = {
        (kind, n): gpu_inference.flops_per_row(model, 10, LENGTH)
        for (kind, n), model in models.items()
    }
    assert result["token", 1] == blocks + LENGTH * labels
    assert result["sequence", 1] == blocks + 2 * WIDTH**2 + labels  # with the pooler
    # A group of five: the encoder and W_h once, W_k for the keys once in both groups of a batch,
    # two products and the labels for every instance.
    group = blocks + 2 * LENGTH * WIDTH**2 + 5 * (2 * 2 * LENGTH * WIDTH**2 + LENGTH * labels)
    keys = 2 * 5 * WIDTH**2
    assert result["token", 5] == (2 * group + keys) / 10


def test_inference_of_tiny_models(monkeypatch):
    monkeypatch.setattr(gpu_inference, "LENGTH", LENGTH)
    inputs = dict(device="cpu", counts=(2, 5), rows=10, rounds=1, compiled=False)
    result = gpu_inference.measure(SHAPE, kinds=("token",), **inputs)
    assert [row["num_instances"] for row in result] == [2, 5]
    for row in result:
        assert row["ratio"] == pytest.approx(
            row["rows_per_second"] / row["stock_rows_per_second"], rel=1e-6
        )
        assert row["share"] == pytest.approx(row["ratio"] / row["ceiling"])
        assert 1 < row["ceiling"] < row["num_instances"] and row["failed"] == {}
    judged = gpu_inference.verdicts([result[0] | {"share": 0.93}, result[1] | {"share": 0.92}])
    assert [verdict.met for verdict in judged] == [True, False]

    def broken(model):
        raise RuntimeError("cannot be compiled")

    monkeypatch.setattr(gpu_inference, "compile_blocks", broken)
    (row,) = gpu_inference.measure(
        SHAPE, kinds=("token",), **inputs | {"counts": (2,), "compiled": True}
    )
    assert row["ours_is"] == row["stock_is"] == "eager"
    assert row["failed"] == {
        f"N = {n}, compiled": "RuntimeError: cannot be compiled" for n in (1, 2)
    }
    make = gpu_inference.make_mux

    def no_mux(kind, shape, instances):
        if torch.get_default_device().type != "meta":
            raise RuntimeError("no room")
        return make(kind, shape, instances)

    monkeypatch.setattr(gpu_inference, "make_mux", no_mux)
    (row,) = gpu_inference.measure(SHAPE, kinds=("token",), **inputs | {"counts": (2,)})
    assert "ratio" not in row and row["failed"] == {"N = 2, eager": "RuntimeError: no room"}
    assert [verdict.met for verdict in gpu_inference.verdicts([row])] == [False]


def trained(rank: int) -> dict[str, object]:
    """Two steps of every part, in a process of its own."""
    import gpu_steps

    gpu_steps.WARM_UP = 1
    mux = Size("small", 10, 1, 0.0, length=LENGTH, more=(*FLAGS, "--intermediate_size", "64"))
    parts = {
        "125m": (gpu_training.measure_size, TINY),
        "broken": (lambda *inputs: 1 // 0, TINY),
        "mux": (gpu_training.measure_mux, mux),
        "demix": (gpu_training.measure_demix, TINY),
    }
    inputs = dict(machine_speed=MACHINE_SPEED, rounds=1, compiled=False)
    record = gpu_training.measure(parts, **inputs, seconds=600)
    late = gpu_training.measure(parts, **inputs, seconds=-1)
    return record | {"late": late["not_measured"]}


@pytest.fixture(scope="module")
def record():
    pytest.importorskip("deepspeed")
    return on_ranks(1, trained)[0]


def test_training_of_tiny_models(record):
    row = record["parts"]["125m"]
    width = WIDTH
    block = 12 * width**2 + 13 * width
    active = 512 * width + LAYERS * block + 2 * width
    assert row["parameters"] == active + (LENGTH + 2) * width
    flops = 6 * active + 12 * LAYERS * width * LENGTH
    best = max(row["plain_tokens_per_second"], row["in_turns_tokens_per_second"])
    assert row["mfu"] == pytest.approx(best * flops / 989e12)
    assert row["of_gemm"] == pytest.approx(best * flops / 1e12)
    assert row["ratio"] == pytest.approx(best / row["peer_tokens_per_second"])
    assert row["measured_bytes"] is None and row["planned_bytes"] > 2 * row["parameters"]
    assert record["parts"]["broken"]["failed"].startswith("ZeroDivisionError: ")
    assert record["parts"]["mux"]["tokens_per_second"] > 0
    demix = record["parts"]["demix"]
    assert demix["time_over_dense"] == pytest.approx(
        demix["dense_tokens_per_second"] / demix["tokens_per_second"]
    )
    assert record["late"] == ["125m", "broken", "mux", "demix"]


def test_verdicts_of_training(record):
    row = {"mfu": 0.36, "mfu_floor": 0.35, "ratio": 1.0, "planned_over_measured": 0.89}
    judged = gpu_training.verdicts({"125m": row, "demix": {"time_over_dense": 1.02}})
    assert [verdict.met for verdict in judged] == [True, False, False, True]
    unknown = gpu_training.verdicts({"350m": row | {"planned_over_measured": None}})
    assert [verdict.met for verdict in unknown] == [True, False, None]
    assert gpu_training.verdicts({"1.3b": {"failed": "out of memory"}}) == []


def test_the_peer_has_our_shape():
    pytest.importorskip("deepspeed")
    config = Job(*TINY.flags).plan.network.config
    peer = gpu_peer.Gpt(512, WIDTH, LAYERS, 2, LENGTH)
    ours = Job(*TINY.flags).plan.network.total_parameters
    assert config.intermediate_size == 4 * WIDTH
    # Our table of positions has two rows more.
    assert sum(p.numel() for p in peer.parameters()) == ours - 2 * WIDTH
    ids = torch.randint(512, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    step = gpu_peer.stepping(peer, [(ids[:, :-1], ids[:, 1:])], 1.0, compiled=False)

    def loss() -> float:
        with torch.no_grad():
            return float(gpu_peer.entropy(peer(ids[:, :-1]), peer.tokens.weight, ids[:, 1:]))

    before = loss()
    for _ in range(5):
        step()
    assert loss() < before
    changed = ids[:, :-1].clone()
    changed[:, 9] += 1
    changed %= 512
    with torch.no_grad():
        same = (peer(changed) - peer(ids[:, :-1])).abs().amax((0, 2)) == 0
    assert same.tolist() == [True] * 9 + [False] * (LENGTH - 9)  # nobody sees what comes later


def test_parts_are_ended_and_left_out(tmp_path):
    def python(code):
        return lambda folder, seconds: ["-c", code]

    fine, slow = python("pass"), python("import time; time.sleep(60)")
    parts = [
        gpu.Part("fine", fine, 30, needed=True),
        gpu.Part("slow", slow, 1.2),
        gpu.Part("wrong", python("raise SystemExit(3)"), 30, needed=True),
        gpu.Part("behind", fine, 30),
        gpu.Part("far behind", fine, 30),
    ]
    started = time.monotonic()
    result = gpu.run(parts, tmp_path / "out", 60)
    assert time.monotonic() - started < 30
    assert [said for _, _, said in result] == [
        *("ok", gpu.TOO_LONG, "exit code 3", "left out", "left out")
    ]
    assert gpu.run(parts[:1], tmp_path / "out", 0.5)[0][2] == "no time left"
    limits = sum(part.limit for part in gpu.PARTS[:4])
    assert gpu.TOTAL < 480 and limits < gpu.TOTAL
    for part in gpu.PARTS:
        command = part.command(tmp_path, part.limit)
        if command[0] != "-m":
            script = (REPOSITORY / command[0]).read_text()
            flags = [word for word in command if word.startswith("--")]
            assert all(f'"{flag}"' in script for flag in flags) and len(flags) > 0


def test_documents(tmp_path, record):
    folder, docs = tmp_path / "out", tmp_path / "docs"
    folder.mkdir(), docs.mkdir()
    page = docs / "results.md"
    page.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nbehind\n")
    assert gpu.write_docs(folder, docs) == []
    row = dict(kind="token", num_instances=5, rows_per_second=500.0, stock_rows_per_second=100.0)
    row |= dict(ours_is="compiled", stock_is="eager", ratio=5.0, ceiling=5.0, share=1.0)
    failed = {"kind": "token", "num_instances": 2, "failed": {"N = 2, eager": "no room"}}
    rows = [row | {"failed": {"N = 1, compiled": "no"}}, failed]
    inference = {"yard": MACHINE_SPEED.make_record(), "inference": rows}
    (folder / "inference.json").write_text(json.dumps(inference))
    (folder / "training.json").write_text(json.dumps(record))
    assert gpu.write_docs(folder, docs) == ["results.md"]
    text = page.read_text()
    assert text.startswith("before\n<!-- measured") and text.endswith("-->\nbehind\n")
    assert "| token, N = 5 | 500 (compiled) | 100 (eager) | 5.00 | 5.00 | 1.000: MET" in text
    assert "* token, N = 1, compiled: no" in text and "* token, N = 2, eager: no room" in text
    assert "| tiny | 64 |" in text and "* broken: failed, ZeroDivisionError" in text
    assert "training 125m: MFU" in text and "of the time of a dense step" in text
    (folder / "training.json").write_text(json.dumps({"skipped": "training needs x", "parts": {}}))
    gpu.write_docs(folder, docs)
    assert "Training: not measured, training needs x." in page.read_text()
    results = (REPOSITORY / "docs" / "results.md").read_text()
    assert results.count(gpu_report.BEGIN) == results.count(gpu_report.END) == 1
