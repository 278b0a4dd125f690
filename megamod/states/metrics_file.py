"""Lines of a metrics.jsonl: one JSON object each, with the step it belongs to."""

import json


def parse_metrics_line(line: bytes) -> dict[str, object] | None:
    """Parse a line of a metrics.jsonl; None if it is no JSON object with a whole number `step`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(record, dict) and type(record.get("step")) is int
    return record if fits else None
