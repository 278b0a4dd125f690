"""Readers of YAML and JSON files that check them against pydantic schemas.

A schema is a subclass of `Schema`. The first value that does not fit becomes a UserError of one
sentence: file, key, value, and what is allowed.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from megamod.errors import UserError, shorten
from megamod.names import is_name

_LARGEST_FILE = {"JSON": 16 * 2**20, "YAML": 2**20}  # bytes; YAML is read at some 50 kB a second
_LARGEST_DEPTH = 100  # far below what the recursion of later code allows
_MOST_VALUES = 10**6  # aliases of YAML count as often as they are used


class Schema(BaseModel):
    """Base of pydantic schemas: unknown keys are refused, values of another type are not converted.

    A file's list becomes a tuple in fields of the type `Items`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: object) -> object:
        """Return `value` if it is a mapping whose keys are fields or aliases, or an instance of the
        class.

        A validator that runs before those of pydantic. Raises ValueError for anything else.
        """
        if isinstance(value, cls):
            return value
        keys = [field.alias or name for name, field in cls.model_fields.items()]
        if not isinstance(value, dict):
            raise ValueError(
                f"{shorten(value)} is not `key: value` lines; keys are {', '.join(keys)}"
            )
        for key in value:
            check_known_word(key, keys, "unknown key")
        return value


Checked = TypeVar("Checked")  # an instance of a schema
Item = TypeVar("Item")


def read_checked_file(
    path: str | Path, schema: type[Checked], origin: str | None = None
) -> Checked:
    """Read a file as an instance of a schema: JSON if its name ends in .json, else YAML.

    Args:
        path: the file.
        schema: a subclass of `Schema`, or a list or dictionary of them or of plain values.
        origin: name of the file in messages; None: its path.
    Raises:
        UserError: if the file cannot be read, is too large or malformed, and naming the first key
            whose value does not fit, with what is allowed.
    """
    path, origin = Path(path), origin or str(path)
    if path.suffix.lower() == ".json":
        return parse_checked_json(_read_bytes(path, "JSON", origin), schema, origin)
    text = _decode_text(_read_bytes(path, "YAML", origin), origin)
    with _report_malformed("YAML", origin):
        value = _Loader(text).get_single_data()
    _check_limits(value, origin)
    return check_against_schema(value, schema, origin)


def parse_checked_json(data: bytes, schema: type[Checked], origin: str) -> Checked:
    """Parse JSON, the content of a file or the body of a request, as an instance of a schema.

    Args:
        schema: see `read_checked_file`.
        origin: name of the data in messages.
    Raises:
        UserError: as `read_checked_file`.
    """
    text = _decode_text(data, origin)
    with _report_malformed("JSON", origin):
        value = json.loads(text, object_pairs_hook=make_unique_keys_hook(origin))
    _check_limits(value, origin)
    return check_against_schema(value, schema, origin)


def read_yaml_with_line_numbers(path: str | Path, origin: str) -> dict[str, tuple[object, int]]:
    """Read the top level of a YAML file: each key with its parsed value and its line number, from
    1.

    Args:
        origin: name of the file in messages.
    Raises:
        UserError: if the file cannot be read, is too large or no such list, and naming line and key
            of a malformed value.
    """
    text = _decode_text(_read_bytes(Path(path), "YAML", origin), origin)
    with _report_malformed("YAML", origin):
        loader = _Loader(text)
        root = loader.get_single_node()
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UserError(f"{origin} is not a list of `key: value` lines")
    lines = {}
    for key_node, value_node in root.value if root else ():
        key, number = str(key_node.value), key_node.start_mark.line + 1
        with _report_malformed("YAML", f"{origin}, line {number}, {key}"):
            lines[key] = loader.construct_object(value_node, deep=True), number
    _check_limits({key: value for key, (value, _) in lines.items()}, origin)
    return lines


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON object that has no schema, such as one of another program, of any size.

    Of a key that appears twice the last value counts.

    Raises:
        FileNotFoundError: if there is no such file, so that callers can say which file is needed.
        UserError: if it cannot be read, or is no object.
    """
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not an object")
    # Maybe half of a character, escaped or as bytes, with which no file can be written.
    if b"\\ud" in data.lower() or b"\xed" in data:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: holds text that cannot be written as UTF-8") from error
    return content


def check_against_schema(
    value: object, schema: type[Checked], origin: str, key: str = ""
) -> Checked:
    """Check a value from a file against a schema, and return it as an instance of the schema.

    Args:
        value: parsed value, such as a dictionary.
        schema: see `read_checked_file`.
        origin: name of the file in messages.
        key: key of the value in the file, for messages; "" for the whole content.
    Raises:
        UserError: naming the first key whose value does not fit, with what is allowed.
    """
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        raise UserError(_format_error(error, origin, key)) from error


def check_known_word(word: object, known: Iterable[str], problem: str) -> None:
    """Raise UserError if `word` is not among the known ones, with the nearest and all of them.

    Args:
        known: the allowed words, at least one.
        problem: beginning of the message, such as "unknown key".
    """
    known = tuple(known)
    if word not in known:
        nearest = difflib.get_close_matches(str(word), known, n=1, cutoff=0)[0]
        raise UserError(
            f"{problem} {shorten(word)}; the nearest is {nearest!r}, allowed are {', '.join(known)}"
        )


def _parse_number(value: object) -> int | float:
    """Return a finite number unchanged; raise ValueError for any other value."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{shorten(value)} is not a finite number")
    return value


def parse_setting(value: object) -> object:
    """Return a value that a flag may have, as YAML reads it; for the type `Setting`.

    Raises:
        ValueError: if it is not text, a number, true, false, null, or a list of these.
    """
    for item in value if type(value) is list else [value]:
        if item is not None and type(item) not in (str, bool, int, float):
            raise ValueError(
                f"{shorten(item)} is not text, a number, true, false or a list of these"
            )
    return value


Key = Annotated[str, BeforeValidator(str)]
"""A key that is text, whatever YAML reads it as."""
Items = Annotated[tuple[Item, ...], BeforeValidator(lambda v: tuple(v) if type(v) is list else v)]
"""A list in a file, as a tuple."""
Setting = Annotated[Any, AfterValidator(parse_setting)]
"""The value of a flag, with the type that YAML reads."""
Number = Annotated[Any, AfterValidator(_parse_number)]
"""A number that keeps its type: a whole one stays whole in records."""


class _Loader(yaml.SafeLoader):
    """Safe loader of YAML that refuses doubled keys."""

    def compose_mapping_node(self, anchor):
        """Compose a mapping; raise MarkedYAMLError for a key that appears twice in it.

        A hook of PyYAML, which calls it for every mapping in the file.

        Args:
            anchor: name of the node for aliases (`&name`), or None; passed on.
        """
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"{shorten(key.value)} appears twice", problem_mark=key.start_mark
                    )
                keys.add(key.value)
        return node


def make_unique_keys_hook(
    origin: str, checked_key: str | None = None
) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    """Make the `object_pairs_hook` of `json.loads` that refuses a key doubled in one object.

    Without it the last value of a doubled key counts. The hook raises UserError, naming the key.

    Args:
        origin: file, or file and line, that begins the message.
        checked_key: the only key that must not appear twice; None: no key may.
    """

    def build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        """Build an object from its (key, value) pairs; raise UserError for a doubled key."""
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs if checked_key in (None, key)]
            doubled = next((key for key in keys if keys.count(key) > 1), None)
            if doubled is not None:
                message = f"{shorten(doubled)} appears twice in one object"
                raise UserError(f"{origin}: not JSON: {message}")
        return content

    return build_object


def _read_bytes(path: Path, kind: str, origin: str) -> bytes:
    """Read a file whole.

    Args:
        kind: "YAML" or "JSON", key of the size limits in `_LARGEST_FILE`.
        origin: name of the file in messages.
    Raises:
        UserError: if it cannot be read, or is larger than the limit.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE[kind] + 1)
    except OSError as error:
        raise UserError(f"{origin} cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_FILE[kind]:
        raise UserError(
            f"{origin} has more than {_LARGEST_FILE[kind]:,} bytes, the most for {kind}"
        )
    return data


def _decode_text(data: bytes, origin: str) -> str:
    """Decode UTF-8 without its byte order mark.

    Args:
        data: content of a file or a request.
        origin: name of it in the message.
    Raises:
        UserError: at the first invalid byte.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: byte {error.start} is not UTF-8") from error


@contextmanager
def _report_malformed(kind: str, origin: str) -> Iterator[None]:
    """Raise errors of the JSON or YAML parser in the block as UserErrors with origin and line.

    Args:
        kind: "YAML" or "JSON", for the message.
        origin: name of the file in messages.
    """
    try:
        yield
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{origin}: {_TOO_DEEP}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{origin}{where}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: not {kind}: {' '.join(str(error).split())}") from error


_TOO_DEEP = f"is nested more than {_LARGEST_DEPTH} deep"


def _check_limits(value: object, origin: str) -> None:
    """Check that the parsed content of a file stays within limits on which later code relies.

    It may not be nested deeper than `_LARGEST_DEPTH`, have more than `_MOST_VALUES` values, whole
    numbers of more than 64 bits, or text that cannot be written as UTF-8.

    Args:
        value: content of the file, or any value in it.
        origin: name of the file in messages.
    Raises:
        UserError: if a limit is exceeded.
    """
    pending, count = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if depth > _LARGEST_DEPTH:
            raise UserError(f"{origin}: {_TOO_DEEP}")
        if count > _MOST_VALUES:
            raise UserError(f"{origin}: holds more than {_MOST_VALUES:,} values")
        if type(item) is int and item.bit_length() > 64:
            raise UserError(f"{origin}: holds a whole number of more than 64 bits")
        if type(item) is str and any("\ud800" <= letter <= "\udfff" for letter in item):
            raise UserError(f"{origin}: {shorten(item)} cannot be written as UTF-8")
        if isinstance(item, dict):
            pending += [(key, depth + 1) for key in item]
            item = item.values()
        elif not isinstance(item, (list, tuple, set)):
            continue
        pending += [(inner, depth + 1) for inner in item]


_MISTAKES = {
    "string_type": "is not text (in quotes, if YAML reads it as something else)",
    "int_type": "is not a whole number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not `key: value` lines",
    "greater_than": "is not more than {gt:g}",
    "greater_than_equal": "is not {ge:g} or more",
    "less_than": "is not less than {lt:g}",
    "less_than_equal": "is not {le:g} or less",
    "too_short": "has fewer than {min_length} items",
    "too_long": "has more than {max_length} items",
}
"""Our words, by pydantic's name of the mistake."""


def _format_error(error: ValidationError, origin: str, key: str) -> str:
    """Format the first error of a validation as one sentence.

    Args:
        origin: the file, which begins the message.
        key: key of the checked value in the file; "" for the whole content. The path of the wrong
            value follows it.
    """
    first = error.errors(include_url=False)[0]
    kind, location, context = first["type"], first["loc"], first.get("ctx", {})
    # pydantic puts the key and "[key]" after the path if the key itself is refused.
    path = key + "".join(map(_format_path_part, location[:-2] if "[key]" in location else location))
    where = f"{origin}, {path.removeprefix('.')}" if path else origin
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where}: {context['error']}"
    value = shorten([*first["input"]] if type(first["input"]) is tuple else first["input"])
    if kind == "literal_error":
        return f"{where}: {value} is not one of {_format_choices(context['expected'])}"
    if kind not in _MISTAKES:
        return f"{where}: {value}: {first['msg']}"
    return f"{where}: {value} {_MISTAKES[kind].format(**context)}"


def _format_path_part(part: str | int) -> str:
    """Format one part of the path of a value: an index, or a key, in quotes unless it is a name."""
    if type(part) is int:
        return f"[{part}]"
    return f".{part}" if is_name(part) else f".{shorten(part)}"


def _format_choices(expected: str) -> str:
    """Format the allowed values of a Literal as `'a', 'b' or 'c'`, pydantic's spelling, without
    quotes.
    """
    return expected.replace("'", "").replace(" or ", ", ")
