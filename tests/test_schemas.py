"""Documents: values of schemas, and one sentence for anything else."""

import json
import math
import re
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from megamod.errors import UserError
from megamod.names import Name, check_name
from megamod.schemas import Items, Number, Schema, check_against_schema, read_checked_file


class Part(Schema):
    """A nested schema."""

    size: int = Field(1, ge=1)
    rate: float | None = None
    share: Annotated[Number, Field(gt=0, lt=2)] = 1
    exact: bool = False
    kind: Literal["near", "far"] = "near"


class Whole(Schema):
    """The schema of the tests."""

    name: Name
    parts: Items[Part] = ()
    by_name: dict[Name, Part] = Field({})
    words: Items[str] = Field((), min_length=0, max_length=3)


def read(folder, text: str | bytes, ending: str = "yaml") -> Whole:
    path = folder / f"doc.{ending}"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_checked_file(path, Whole)


def test_both_formats_give_the_same(tmp_path):
    content = {
        "name": "a.b-c_1+d",
        "parts": [{"size": 3, "rate": 2, "share": 1}, {"rate": None, "kind": "far"}],
        "by_name": {"x": {"exact": True}},
        "words": ["1", "no"],
    }
    document = read(tmp_path, json.dumps(content), "json")
    assert (
        document == read(tmp_path, json.dumps(content)) == check_against_schema(content, Whole, "x")
    )
    assert document.parts == (Part(size=3, rate=2.0, share=1), Part(kind="far"))
    assert type(document.parts[0].rate) is float and type(document.parts[0].share) is int
    assert read(tmp_path, b"\xef\xbb\xbfname: 3\nby_name: {1.5: {}}").by_name == {"1.5": Part()}
    with pytest.raises(ValueError, match="frozen"):
        document.name = "other"


NESTED = "name: a\nparts: [{size: 2}, {%s}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": None is not `key: value` lines; keys are name, parts, by_name, words"),
        ("[a]", ": ['a'] is not `key: value` lines"),
        ("parts: []", ", name is missing"),
        ("name: a\nprats: []", ": unknown key 'prats'; the nearest is 'parts', allowed are name,"),
        ("name: a\n3: []", ": unknown key 3; the nearest is"),
        (NESTED % "sise: 3", ", parts[1]: unknown key 'sise'; the nearest is 'size', allowed are"),
        (NESTED % "size: 0", ", parts[1].size: 0 is not 1 or more"),
        (NESTED % "size: true", ", parts[1].size: True is not a whole number"),
        (NESTED % "size: '3'", ", parts[1].size: '3' is not a whole number"),
        (NESTED % "size: 3.0", ", parts[1].size: 3.0 is not a whole number"),
        (NESTED % "rate: true", ", parts[1].rate: True is not a number"),
        (NESTED % "rate: '1'", ", parts[1].rate: '1' is not a number"),
        (NESTED % "share: false", ", parts[1].share: False is not a finite number"),
        (NESTED % "share: .inf", ", parts[1].share: inf is not a finite number"),
        (NESTED % "share: 2", ", parts[1].share: 2 is not less than 2"),
        (NESTED % "exact: 1", ", parts[1].exact: 1 is not true or false"),
        (NESTED % "kind: nar", ", parts[1].kind: 'nar' is not one of near, far"),
        ("name: a\nparts: [3]", ", parts[0]: 3 is not `key: value` lines; keys are size"),
        ("name: a\nparts: {}", ", parts: {} is not a list"),
        ("name: a\nwords: [1]", ", words[0]: 1 is not text (in quotes"),
        ("name: a\nwords: [a, b, c, d]", "has more than 3 items"),
        ("name: a\nby_name: {x: {size: x}}", ", by_name.x.size: 'x' is not a whole number"),
        ("name: a\nby_name: {../x: {}}", ", by_name: '../x' is not made of letters"),
        ("name: a\nby_name: 3", ", by_name: 3 is not `key: value` lines"),
        ("name: yes", ", name: True is not made of"),
        ("name: a\nname: b", ", line 2, column 1: not YAML: 'name' appears twice"),
        ("name: a\nby_name: {x: {}, 'x': {}}", ", line 2, column 18: not YAML: 'x' appears twice"),
        ("name: [", ", line 1, column 8: not YAML: "),
        ("name: a\n---\nname: b", ": not YAML: "),
        ("name: !!python/object:os.system {}", "not YAML: could not determine a constructor"),
        ("name: 2020-13-01", ": not YAML: month must be in 1..12"),
        (b"name: \xff", ": byte 6 is not UTF-8"),
        ("name: a\nparts: [{size: 0x" + "f" * 5000 + "}]", "a whole number of more than 64 bits"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    sentence = str(error.value).removeprefix(str(tmp_path / "doc.yaml"))
    assert message in sentence and len(sentence.splitlines()) == 1 and len(sentence) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ": not JSON: Expecting property name"),
        ('{"name": "a", "name": "b"}', ": not JSON: 'name' appears twice"),
        ('{"parts": [{"on": 1, "on": 2}]}', ": not JSON: 'on' appears twice"),
        ('{"name": ' + "9" * 5000 + "}", ": not JSON: "),
        ('{"name": "\\ud800"}', ": '\\ud800' cannot be written as UTF-8"),
        ('{"name": "a", "words": ["\\ud800"]}', ": '\\ud800' cannot be written as UTF-8"),
        ("[]", ": [] is not `key: value` lines"),
    ],
)
def test_mistakes_in_json(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(f"doc.json{message}")):
        read(tmp_path, text, "json")


@pytest.mark.parametrize("ending", ["yaml", "json"])
@pytest.mark.parametrize("depth", [60, 10_000])
def test_deep_documents_are_refused(tmp_path, ending, depth):
    text = '{"a": [' * depth + "]}" * depth
    with pytest.raises(UserError, match=f"doc.{ending}: is nested more than 100 deep"):
        read(tmp_path, text, ending)


def test_large_documents_are_refused(tmp_path):
    with pytest.raises(UserError, match="has more than 1,048,576 bytes, the most for YAML"):
        read(tmp_path, " " * (2**20 + 1))
    aliases = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
    )
    with pytest.raises(UserError, match="holds more than 1,000,000 values"):
        read(tmp_path, aliases)
    with pytest.raises(UserError, match="is nested more than 100 deep"):
        read(tmp_path, "name: &a [*a]")
    with pytest.raises(UserError, match=r"words: \{'xxx.*y\.\.\. is not a list") as error:
        read(tmp_path, f"name: a\nwords: {{{', '.join(f'{x * 50}: {x * 50}' for x in 'xyz')}}}")
    assert len(str(error.value)) < 400


def test_merged_keys_are_no_doubles(tmp_path):
    text = "name: n\nby_name: {a: &a {size: 3, exact: true}, b: {<<: *a, size: 4}}"
    assert read(tmp_path, text).by_name["b"] == Part(size=4, exact=True)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(UserError, match="recipe x cannot be read: No such file"):
        read_checked_file(tmp_path / "x", Whole, "recipe x")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_checked_file(tmp_path, Whole)


def test_names():
    for name in ("a", "sst-2", "a.b", "x" * 100, "ff+attn"):
        assert check_name(name, "--domain") == name
    for name in ("", ".", "..", ".a", "a/b", "../a", "a b", "é", "x" * 101, "a\n", "-\0"):
        with pytest.raises(UserError, match=r"--domain: .* is not made of letters"):
            check_name(name, "--domain")


KEYS = st.sampled_from(["name", "parts", "by_name", "words", "size", "rate", "exact", "kind", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | LEAVES, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=40)
@given(st.dictionaries(KEYS, VALUES))
def test_any_value_is_accepted_or_refused_in_one_sentence(content):
    try:
        document = check_against_schema({"name": "a", **content}, Whole, "file")
    except UserError as error:
        assert str(error).startswith("file") and "\n" not in str(error)
    else:
        assert check_against_schema(_plain(document), Whole, "file") == document


def _plain(value: object) -> object:
    """A document as the lists and mappings of its file."""
    if isinstance(value, (Schema, dict)):
        return {key: _plain(inner) for key, inner in dict(value).items()}
    value = 0 if isinstance(value, float) and math.isnan(value) else value
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
