import pytest

from megamod.errors import UserError
from megamod.runs.model_output import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5B", 5e9), ("5GB", 5e9), ("1.5G", 1.5e9), ("200MB", 2e8), ("3k", 3e3), ("77", 77)],
)
def test_sizes(text, size):
    assert parse_size(text, "--max_shard_size") == size


@pytest.mark.parametrize("text", ["", "5X", "-1M", "0", "5BB", "M", "1e3", "inf"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="--max_shard_size"):
        parse_size(text, "--max_shard_size")
