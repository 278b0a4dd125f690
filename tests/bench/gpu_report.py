"""Figures of whole models on a GPU, as text for a document."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clock import format_machine_speed
from floors import Verdict
from report import replace_between_markers

BEGIN, END = "<!-- measured on a gpu -->", "<!-- end of measured on a gpu -->"
Row = Mapping[str, object]


def inference(record: Mapping[str, object], judged: Sequence[Verdict]) -> str:
    """A line for each kind of classifier and N, from what `gpu_inference.py` wrote."""
    lines = [f"Inference ({format_machine_speed(record['yard'])}, same run):", ""]
    lines += [
        "| MUX-BERT base, classification | rows/s | stock BERT, rows/s | ratio | ceiling of "
        "operations | share of it |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kind']}, N = {row['num_instances']} | {row['rows_per_second']:.0f} "
        f"({row['ours_is']}) | {row['stock_rows_per_second']:.0f} ({row['stock_is']}) | "
        f"{row['ratio']:.2f} | {row['ceiling']:.2f} | {row['share']:.3f}: {verdict.status}, "
        f"at least {verdict.limit:g} |"
        for row, verdict in zip(record["inference"], judged, strict=True)
        if "ratio" in row
    ]
    failed = [
        f"* {row['kind']}, {where}: {said}"
        for row in record["inference"]
        for where, said in row["failed"].items()
    ]
    return "\n".join(lines + (["", "Without a time:", "", *failed] if failed else []))


def training(record: Mapping[str, object], judged: Sequence[Verdict]) -> str:
    """A line for each size and for further steps, from what `gpu_training.py` wrote."""
    if why := record.get("skipped"):
        return f"Training: not measured, {why}."
    parts = record["parts"]
    lines = [
        f"Training ({format_machine_speed(record['yard'])}, same run; bf16, ZeRO 1, one GPU):",
        "",
    ]
    sizes = [row for row in parts.values() if "mfu_floor" in row]
    if sizes:
        lines += [
            "| model | tokens a step | tokens/s | with plain blocks | peer, tokens/s | ratio "
            "| MFU of 989 TFLOP/s | of the GEMM rate | peer's MFU | planned / measured memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for row in sizes:
        best = max(row["plain_tokens_per_second"], row["in_turns_tokens_per_second"])
        memory = row["planned_over_measured"]
        lines.append(
            f"| {row['name']} | {row['tokens_per_step']:,} | {best:,.0f} | "
            f"{row['plain_tokens_per_second']:,.0f} | {row['peer_tokens_per_second']:,.0f} | "
            f"{row['ratio']:.3f} | {row['mfu']:.1%} | {row['of_gemm']:.1%} | "
            f"{row['peer_mfu']:.1%} | {'-' if memory is None else f'{memory:.3f}'} |"
        )
    lines.append("")
    if "tokens_per_second" in (row := parts.get("mux", {})):
        lines.append(
            f"* {row['name']}, a step of masked-token pretraining: "
            f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}, {row['of_gemm']:.1%} "
            "of the GEMM rate."
        )
    if "time_over_dense" in (row := parts.get("demix", {})):
        lines.append(
            f"* DEMix {row['model']}, one expert: {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['time_over_dense']:.3f} of the time of a dense step."
        )
    lines += [f"* {n}: failed, {r['failed']}." for n, r in parts.items() if "failed" in r]
    if left := record["not_measured"]:
        lines.append(f"* Not measured, no time left: {', '.join(left)}.")
    lines += [f"* {verdict}" for verdict in judged]
    return "\n".join(lines)


def write(texts: Sequence[str], path: Path) -> None:
    """Put these between the markers of a document."""
    replace_between_markers(path, BEGIN, END, "\n\n".join(texts))
