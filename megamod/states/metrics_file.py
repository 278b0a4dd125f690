"""Lines of a metrics.jsonl: one JSON object each, with the step it belongs to."""

import json


def read_record(line: bytes) -> dict[str, object] | None:
    """Read the record of a line; None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(record, dict) and type(record.get("step")) is int
    return record if fits else None
