"""The microbenchmarks of kernels: what they measure, judge, leave out and write."""

import csv
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import every_kernel  # noqa: E402
import flex  # noqa: E402
import floors  # noqa: E402
import report  # noqa: E402
import schedule  # noqa: E402
from cases import CASES, parse_shape  # noqa: E402
from clock import Clock, MachineSpeed, compute_percentiles  # noqa: E402
from command import run_benchmark_main  # noqa: E402
from measure import OUT_OF_TIME, compute_errors, make_variants, measure_case  # noqa: E402
from overhead import measure_launch_overhead  # noqa: E402
from schedule import Request, list_all_requests, measure_all, replace_cases  # noqa: E402

MACHINE_SPEED = MachineSpeed("a device", 1e9, 1e12, "some software")


class SmallClock(Clock):
    """With little to write between calls."""

    def __init__(self, device: str):
        self.cuda, self.flush = False, torch.empty(1 << 10)


@pytest.fixture(autouse=True)
def small_clock(monkeypatch):
    monkeypatch.setattr("measure.Clock", SmallClock)


@pytest.mark.parametrize("op", CASES)
def test_every_operation_in_every_mode(op):
    case = CASES[op](parse_shape("tiny-n3-s4-g2"), "fp32", "cpu")
    variants = make_variants(case, "none")
    assert "ours" in variants and len(variants) > 1
    for mode in floors.MODES:
        rows = measure_case(case, mode, variants, MACHINE_SPEED, 2)
        assert [row["variant"] for row in rows] == list(variants)
        for row in rows:
            assert row["us_p20"] <= row["us"] <= row["us_p80"] and row["error"] < 1e-6
            least = max(case.bytes[mode] / 1e9, case.flops[mode] / 1e12) * 1e6
            assert row["floor_us"] == pytest.approx(least)
            assert row["share_of_floor"] == pytest.approx(least / row["us"])
            assert (row["grad_error"] is None) == (mode == "fwd")
            assert mode == "fwd" or 0 < row["grad_error"] < 5e-6


def test_errors_are_relative_and_the_worst_of_all_gradients():
    exact = [torch.tensor([3.0, 4.0]).double(), torch.ones(4).double(), torch.ones(1).double()]
    result = [torch.tensor([3.0, 4.5]), torch.ones(4) * 1.25, torch.ones(1)]
    assert compute_errors(result, exact) == {"error": 0.1, "grad_error": 0.25}
    assert compute_errors(result[:1], exact)["grad_error"] is None


def test_a_variant_that_fails_is_told_and_ends_nothing():
    def broken(**inputs):
        raise RuntimeError("no such kernel\nand more")

    case = CASES["multiplex"](parse_shape("tiny-n2-s2-g1"), "fp32", "cpu")
    variants = {"broken": broken, **make_variants(case, "none")}
    rows = measure_case(case, "fwd_bwd", variants, MACHINE_SPEED, 1)
    assert rows[0]["failed"] == "RuntimeError: no such kernel" and "us" not in rows[0]
    assert all("us" in row for row in rows[1:])
    late = measure_case(case, "fwd", variants, MACHINE_SPEED, 1, deadline=0.0)
    assert [row.get("failed") for row in late] == [OUT_OF_TIME, None, OUT_OF_TIME]
    named = [{"op": "multiplex", "shape": "s", "dtype": "fp32", "instances": 2, **r} for r in rows]
    assert "failed: RuntimeError: no such kernel" in report.format_table(named)


def test_what_is_compiled():
    case = CASES["instance_attention"](parse_shape("tiny-n2-s2-g1"), "fp32", "cpu")
    case = replace(case, compiled_only={"flex": case.variants["ours"]})
    assert list(make_variants(case, "default")) == [
        *("ours", "eager sdpa", "compile eager sdpa", "compile flex")
    ]
    assert list(make_variants(case, "all"))[4:] == ["max-autotune eager sdpa"]


def test_flex_attention_is_the_same_attention():
    case = CASES["instance_attention"](parse_shape("tiny-n3-s5-g2"), "fp32", "cpu")
    arguments = {name: tensor.detach() for name, tensor in case.inputs.items()}
    expected = case.reference(**arguments)
    assert flex.make_flex_variants(3, 5, 2, "cpu") == {}  # it has no backward pass there
    for peer in (
        flex.make_block_diagonal_attention(3, 5, 2, "cpu"),
        flex.make_per_position_attention(2),
    ):
        torch.testing.assert_close(peer(**arguments), expected)


def test_the_important_comes_first_and_nothing_is_forgotten():
    requests = list_all_requests([*CASES, "new_op"])
    assert str(requests[0]) == "rsa_demux base-n5 fwd_bwd"
    assert [w.op for w in requests[:5]] == [
        *("rsa_demux", "rsa_demux_l3", "mux_embed", "multiplex", "instance_attention")
    ]
    pairs = {(request.op, request.shape) for request in requests}
    assert all((op, shape) in pairs for op in (*CASES, "new_op") for shape in schedule.SHAPES)
    judged = {(op, mode) for floor in floors.FLOORS for op in floor.ops for mode in floor.modes}
    assert {(op, mode) for w in schedule.FIRST for op in [w.op] for mode in w.modes} >= judged - {
        ("multiplex", "bwd")
    }
    assert {request.op for request in list_all_requests(["multiplex"])} == {"multiplex"}


def test_when_time_is_over_the_rest_is_listed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now[0])

    def slow(case, mode, variants, machine_speed, rounds, deadline):
        now[0] += 4
        assert deadline == 10
        return [{"variant": "ours", "mode": mode}]

    monkeypatch.setattr(schedule, "measure_case", slow)
    requests = [Request("multiplex", f"tiny-n2-s{length}-g1") for length in (1, 2, 3, 4)]
    result = list(
        measure_all(
            requests,
            device="cpu",
            dtype="fp32",
            rounds=1,
            compiled="none",
            machine_speed=MACHINE_SPEED,
            seconds=10,
        )
    )
    assert [rows is not None for _, rows in result] == [True, True, True, False]
    assert result[1][1] == [
        {"op": "multiplex", "shape": "tiny-n2-s2-g1", "instances": 2, "dtype": "fp32",
         "variant": "ours", "mode": "fwd_bwd"}
    ]  # fmt: skip


def row(op="rsa_demux", variant="ours", us=10.0, **more):
    """A made-up row."""
    message = dict(
        op=op, shape="base-n5", instances=5, mode="fwd_bwd", dtype="bf16", variant=variant
    )
    message |= dict(us=us, us_p20=us, us_p80=us, host_us=1.0, bytes=1e9, flops=1.0, floor_us=us / 2)
    return message | dict(share_of_floor=0.5, error=1e-3, grad_error=2e-3) | more


def words(rows):
    return {(v.shape, v.title, v.limit): v.status for v in floors.judge_floors(rows)}


def test_verdicts():
    concat, split = "compile eager concat", "compile eager split"
    rows = [row(), row(variant=concat, us=30.0), row(variant="max-autotune eager concat", us=19.9)]
    folder = "rsa_demux base-n5 fwd_bwd"
    said = words(rows)
    assert said[folder, "best compile of the concatenated form / ours", 2.0] == "MISSED"
    assert said[folder, "best compile of the split form / ours", 1.15] == "not measured"
    said = words([*rows[:2], row(variant=split, us=11.5)])
    assert set(said.values()) == {"MET"} and len(said) == 2
    two = [{**item, "instances": 2, "shape": "base-n2"} for item in rows]
    assert ("rsa_demux base-n2 fwd_bwd", "best compile of the concatenated form / ours", 1.6) in (
        words(two)
    )
    failed = {k: v for k, v in row().items() if k not in ("us", "bytes")} | {"failed": "it did"}
    assert set(words([failed, rows[1]]).values()) == {"MISSED"}
    assert not words([row(dtype="fp32"), row(variant=concat, dtype="fp32")])
    assert not words([row(variant=concat)])
    shares = {
        size: words([row("multiplex", mode="fwd", bytes=size, share_of_floor=0.84)])
        for size in (1e9, 1e6)
    }
    key = ("multiplex base-n5 fwd", "share of copy bandwidth", 0.85)
    assert shares[1e9][key] == "MISSED" and key not in shares[1e6]
    assert floors.judge_overhead({"extra_us": 15.0}).met
    assert not floors.judge_overhead({"extra_us": 15.1}).met
    assert str(floors.Verdict("here", "speed", None, 2.0)) == (
        "here: speed -, floor >= 2: not measured"
    )


def test_a_case_measured_again_replaces_the_first():
    old = [row(), row(variant="compile eager split"), row(op="mux_embed")]
    new = [row(us=5.0)]
    assert replace_cases(old, new) == [old[2], new[0]]


def test_what_is_written_into_a_document(tmp_path):
    record = {
        "yard": MACHINE_SPEED.make_record(),
        "rows": [
            row(),
            row(variant="compile eager concat", us=30.0),
            {k: v for k, v in row(variant="x").items() if k != "us"} | {"failed": "Error: away"},
        ],
        "overhead": {"ours_us": 20.0, "torch_us": 8.0, "extra_us": 12.0},
        "not_measured": ["keyed_linear base-n5 fwd_bwd"],
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nbehind\n")
    report.write_table_into_document(record, page)
    text = page.read_text()
    assert text.startswith("before\n\n<!-- measured -->") and text.endswith("-->\n\nbehind\n")
    assert "old" not in text and "a device, some software: copy 1 GB/s, GEMM 1 TFLOP/s" in text
    line = next(line for line in text.splitlines() if line.startswith("| rsa_demux"))
    assert line.startswith(
        "| rsa_demux | base-n5 | fwd_bwd | bf16 | 10.0 | 0.50 | 1.0e-03 | 2.0e-03 | "
        "30.0 (compile eager concat) | 3.00 | MET"
    )
    assert "* rsa_demux base-n5 fwd_bwd x: Error: away" in text
    assert "Not measured, no time left: keyed_linear base-n5 fwd_bwd." in text
    assert "20.0 (multiplex) and 8.0 (mean): MET (12.0 more, at most 15)" in text
    report.write_table_into_document(record, page)
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match=r"page\.md: needs <!-- measured -->"):
        report.write_table_into_document(record, page)
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    kernels = (REPOSITORY / "docs" / "kernels.md").read_text()
    assert kernels.count(report.BEGIN) == kernels.count(report.END) == 1


def command(monkeypatch, *flags) -> int:
    """The exit code of kernels/bench/run.py."""
    spec = importlib.util.spec_from_file_location("kernel_bench", BENCH / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, flags)])
    return module.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clock.Clock.__init__", SmallClock.__init__)
    files = {name: tmp_path / "out" / f"k.{name}" for name in ("json", "csv", "png")}
    flags = ["--op", "multiplex", "--device", "cpu", "--compile", "none", "--rounds", 2]
    flags += ["--mode", "fwd", "bwd", "--shape", "tiny-n2-s4-g2", "tiny-n5-s4-g2"]
    flags += ["--dtype", "fp32", "--json", files["json"], "--csv", files["csv"]]
    assert command(monkeypatch, *flags, "--plot", files["png"]) == 0
    record = json.loads(files["json"].read_text())
    assert len(record["rows"]) == 2 * 2 * 2 and record["overhead"]["ours_us"] > 0
    with open(files["csv"], newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["variant"] for line in read] == ["ours", "eager"] * 4
    if importlib.util.find_spec("matplotlib"):  # else nothing is drawn
        assert files["png"].read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "tiny-n5-s4-g2" in said and "failed" not in said
    assert command(monkeypatch, "--list") == 0
    listed = capsys.readouterr().out
    assert all(op in listed for op in CASES)
    with pytest.raises(SystemExit, match="--op nothing: there are multiplex, "):
        command(monkeypatch, "--op", "nothing")
    with pytest.raises(SystemExit, match="--shape huge: write SIZE-nN"):
        command(monkeypatch, "--op", "multiplex", "--shape", "huge")
    assert command(monkeypatch, *flags, "--all", "--minutes", 0) == 0
    assert "not measured, no time left: multiplex tiny-n2-s4-g2 fwd/bwd" in capsys.readouterr().out
    assert json.loads(files["json"].read_text())["rows"] == []


def test_what_a_memory_checker_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["every_kernel.py", "--device", "cpu"])
    assert every_kernel.main() == 0
    said = capsys.readouterr().out
    assert all(f"{op} {dtype}: finite" in said for op in CASES for dtype in ("bf16", "fp32"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["every_kernel.py", "--memcheck"])
    assert every_kernel.main() == 0
    assert "compute-sanitizer is not on the PATH" in capsys.readouterr().out


def test_overhead_and_percentiles():
    result = measure_launch_overhead("cpu", calls=3, rounds=2)
    assert result["extra_us"] == pytest.approx(result["ours_us"] - result["torch_us"])
    assert compute_percentiles([1.0]) == (1.0, 1.0, 1.0)
    assert compute_percentiles([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)


def test_a_mistake_is_no_missed_floor(capsys):
    def mistaken():
        raise SystemExit("--op nothing: there are others")

    with pytest.raises(SystemExit) as ended:
        run_benchmark_main(mistaken)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "--op nothing: there are others\n"
    for code in (0, 1):
        with pytest.raises(SystemExit) as ended:
            run_benchmark_main(lambda code=code: code)
        assert ended.value.code == code
