"""Flags from dataclasses, filled from a recipe, the environment and the command line.

A value is looked up in this order, later ones winning: the default of the field, the recipe (an
optional YAML file, the first argument), the variable `MEGAMOD_<FLAG>` unless it is empty, the flag.
The parser is plain argparse: importing transformers' HfArgumentParser alone takes about a second,
which is all that `--help` may take.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from megamod.command_line import CommandParser, make_unknown_word_error, set_completions
from megamod.errors import UserError
from megamod.schemas import read_yaml_with_line_numbers


def option(
    default: object,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    alias: str | None = None,
    separator: str | None = None,
) -> Any:
    """Make a dataclass field that is a flag, for a subclass of `Arguments`.

    Args:
        default: value if no source sets the field.
        help: one line, shown by `--help`.
        least, most: inclusive bounds of a number.
        alias: a second spelling of the flag, without dashes; None: it has none.
        separator: character between the items of a list that is written as one word, besides
            blanks; None: blanks alone. A comma always divides a list of numbers.
    """
    metadata = dict(help=help, least=least, most=most, alias=alias, separator=separator)
    return field(default=default, metadata=metadata)


class Arguments:
    """Base of dataclasses of flags, which checks types, choices and bounds of all fields.

    Attributes:
        free_on_resume: fields that may differ in a resumed run because they decide no numbers.

    Raises:
        UserError: naming the flag, the value and what is allowed.
    """

    free_on_resume: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        """Check all fields, and convert whole numbers of float fields to float."""
        for f in fields(self):
            setattr(self, f.name, _check_value(f, getattr(self, f.name), f"--{f.name}"))


def parse_args(*classes: type, argv: Sequence[str] | None = None, doc: str | None = None) -> tuple:
    """Parse `[RECIPE.yaml] [--flag value ...]` and the environment into instances of `classes`.

    A flag overrides its environment variable, that overrides the recipe, and that the default.
    `find_origin` tells the origin of each value.

    Args:
        classes: dataclasses of flags, without common field names.
        argv: arguments without the program's name; None: those of the process.
        doc: docstring of the command: its first paragraph heads the help, the rest ends it.
    Returns:
        an instance of each class, in the order of `classes`.
    Raises:
        UserError: for an unknown flag or key, with the nearest valid one, for values that a field
            does not allow, and for a recipe that cannot be read.
    """
    arguments = [
        re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument)
        for argument in (sys.argv[1:] if argv is None else argv)
    ]
    fields_by_name = {f.name: f for cls in classes for f in fields(cls)}
    values: dict[str, tuple[object, str]] = {}
    # The deepspeed launcher inserts --local_rank=N before the arguments of the user.
    recipe_index = 1 if arguments and re.match("--local_rank=", arguments[0]) else 0
    if len(arguments) > recipe_index and not arguments[recipe_index].startswith("-"):
        values |= _read_recipe(Path(arguments.pop(recipe_index)), fields_by_name)
    flags = vars(_parse_flags(arguments, classes, doc))
    for name, f in fields_by_name.items():
        variable = f"MEGAMOD_{name.upper()}"
        if os.environ.get(variable):
            values[name] = _parse_value(f, os.environ[variable], f"environment {variable}")
        spelling = _find_spelling(f, flags)
        if spelling:
            values[name] = _parse_value(f, spelling[1], f"--{spelling[0]}")
    parsed = []
    for cls in classes:
        try:
            args = cls(**{f.name: values[f.name][0] for f in fields(cls) if f.name in values})
        except UserError as error:
            named = re.match(r"--(\w+)", str(error))
            origin = values.get(named[1], ("", ""))[1] if named else ""
            raise UserError(
                f"{origin}: {error}" if origin[:2] not in ("", "--") else error
            ) from error
        args._origins = {f.name: values[f.name][1] for f in fields(cls) if f.name in values}
        parsed.append(args)
    return tuple(parsed)


def move_argument_to_flag(words: Sequence[str], flag: str) -> list[str]:
    """Move the only bare word of a command line to its end, as the value of `flag`.

    A bare word is neither a flag nor follows one: the FILE of `megamod merge FILE --device cpu`.
    With no such word or several, or if `flag` is present, the words are returned as they are.

    Args:
        words: arguments without the program's name.
        flag: flag with its dashes, such as "--recipe".
    """
    alone = [
        number
        for number, word in enumerate(words)
        if not word.startswith("-")
        and (number == 0 or not re.fullmatch(r"--[^=]+", words[number - 1]))
    ]
    if len(alone) != 1 or flag in words:
        return list(words)
    (number,) = alone
    return [*words[:number], *words[number + 1 :], flag, words[number]]


def find_origin(args: Arguments, name: str) -> str:
    """Find the origin of a value: "default", "recipe FILE", "environment VAR" or "--flag"."""
    return getattr(args, "_origins", {}).get(name, "default")


def set_values(args: Arguments, values: Mapping[str, object], origin: str) -> None:
    """Set fields to these values, in place; fields whose value changes get this `origin`.

    Args:
        values: by field name; names of other dataclasses are ignored.
        origin: for `find_origin` and messages, such as "DeepSpeed FILE".
    Raises:
        UserError: naming the origin, the value and what is allowed.
    """
    for f in fields(args):
        if f.name in values and values[f.name] != getattr(args, f.name):
            setattr(args, f.name, _check_value(f, values[f.name], f"{origin}, {f.name}"))
            args._origins = {**getattr(args, "_origins", {}), f.name: origin}


def refuse_values_without_effect(args: Arguments, names: Iterable[str], reason: str) -> None:
    """Refuse values of fields that have no effect in this command, unless they are the defaults.

    Args:
        names: names of the fields; those of other dataclasses are ignored.
        reason: clause that says why they have no effect, for the message.
    Raises:
        UserError: naming the first such flag.
    """
    for f in fields(args):
        value = getattr(args, f.name)
        if f.name in names and value != f.default:
            raise UserError(f"--{f.name} {value} has no effect: {reason}; leave it out")


def require_values(args: Arguments, *names: str) -> None:
    """Raise UserError if one of the named fields is None; names that `args` lacks are ignored."""
    for f in fields(args):
        if f.name in names and getattr(args, f.name) is None:
            raise UserError(f"--{f.name} is missing: {f.metadata['help']}")


def format_flags(values: Mapping[str, object]) -> list[str]:
    """Format values as the words of a command line, which `parse_args` reads.

    Args:
        values: value by name of the flag, without dashes; a list gives one word per item.
    """
    words = []
    for name, value in values.items():
        words += [
            f"--{name}",
            *map(_format_value, value if isinstance(value, (list, tuple)) else [value]),
        ]
    return words


def _format_value(value: object) -> str:
    """Format a value as a word of a command line."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_recipe(path: Path, fields_by_name: dict[str, Field]) -> dict[str, tuple[object, str]]:
    """Read a recipe: the checked value and its origin by field name.

    Args:
        path: the YAML file.
        fields_by_name: fields of all dataclasses of flags; an alias has an entry too.
    Raises:
        UserError: if the file cannot be read, or has an unknown key or a value that is not allowed.
    """
    origin, values = f"recipe {path}", {}
    if not path.exists():
        raise UserError(
            f"{origin} cannot be read: there is no such file; `megamod recipes` lists those that "
            "come along"
        )
    for key, (value, line) in read_yaml_with_line_numbers(path, origin).items():
        where = f"{origin}, line {line}"
        if key not in fields_by_name:
            raise make_unknown_word_error(f"{where}: unknown key", key, fields_by_name)
        if isinstance(value, str) and _parse_field_type(fields_by_name[key])[0] is float:
            value = _convert_text(float, value)  # YAML 1.1 reads 1e-3 as text
        values[key] = _check_value(fields_by_name[key], value, f"{where}, {key}"), origin
    return values


def _parse_flags(
    arguments: list[str], classes: Sequence[type], doc: str | None
) -> argparse.Namespace:
    """Parse the flags on the command line to a namespace of those that are present.

    An attribute is named as the flag was spelled, and its value is text or a list of texts.

    Args:
        arguments: words without the program's name and the recipe.
        classes: dataclasses of flags, each a section of --help.
        doc: docstring of the command, see `parse_args`.
    Raises:
        UserError: for unknown words.
    """
    parser = CommandParser(
        doc,
        usage="%(prog)s [RECIPE.yaml] [--flag value ...]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # LOCAL_RANK is what is read
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip("."))
        for f in fields(cls):
            kind, choices, _ = _parse_field_type(f)
            # DeepSpeed's own parser knows --deepspeed as a switch, so it may stand bare.
            bare = kind is bool or f.name == "deepspeed"
            argument_options = dict(
                nargs="+" if get_origin(kind) is list else "?" if bare else None,
                const="true" if kind is bool else None,
                metavar="{" + ",".join(choices) + "}" if choices else _NAMES[kind][0],
            )
            text = f"{f.metadata['help']} (default: {'none' if f.default is None else f.default})"
            action = group.add_argument(
                f"--{f.name}", help=text.replace("%", "%%"), **argument_options
            )
            if choices:
                set_completions(action, choices)
            if f.metadata["alias"]:
                group.add_argument(
                    f"--{f.metadata['alias']}", help=f"same as --{f.name}", **argument_options
                )
    return parser.parse_args(arguments)


def _find_spelling(flag_field: Field, flags: dict[str, object]) -> tuple[str, object] | None:
    """Find spelling and text of a field's flag on the command line; None if it is absent.

    Args:
        flag_field: field of a dataclass of flags.
        flags: see `_parse_flags`.
    Raises:
        UserError: if both spellings are there with different values; `x` and `./x` are one path.
    """
    spellings = (flag_field.name, flag_field.metadata["alias"])
    values = {name: flags[name] for name in spellings if flags.get(name) is not None}
    if len({os.path.normpath(str(value)) for value in values.values()}) > 1:
        both = " and ".join(f"--{name} {value}" for name, value in values.items())
        raise UserError(f"{both} are one flag with two values; give one of them")
    return next(iter(values.items()), None)


def _parse_value(flag_field: Field, text: str | list[str], origin: str) -> tuple[object, str]:
    """Parse the text of a flag or an environment variable.

    Args:
        flag_field: field of a dataclass of flags.
        text: the text, or for a list on the command line its words.
        origin: name of the flag or variable, for the message.
    Returns:
        the checked value, and `origin` unchanged.
    Raises:
        UserError: for a value that the field does not allow.
    """
    kind, _, optional = _parse_field_type(flag_field)
    value = None
    if not optional or text not in ("none", ["none"]):
        separator = "," if kind == list[float] else flag_field.metadata["separator"]
        value = _convert_text(kind, _split_items(text, separator) if separator else text)
    return _check_value(flag_field, value, origin), origin


def _split_items(text: str | list[str], separator: str) -> list[str]:
    """Split the items of a list at blanks, or a single word at the separator, as `0.1,0.9`.

    A word with an empty item, such as `a::b`, is left whole.

    Args:
        text: text of an environment variable, or the words of a flag.
        separator: character between the items of one word, see `option`.
    """
    words = text.split() if isinstance(text, str) else text
    items = words[0].split(separator) if len(words) == 1 else words
    return items if all(items) else words


def _convert_text(kind: type, text: str | list[str]) -> object:
    """Convert text to a value of `kind`; return the text itself if it is not one.

    A list is converted item by item. `_check_value` refuses what is left as text.
    """
    if get_origin(kind) is list:
        words = text.split() if isinstance(text, str) else text
        return [_convert_text(get_args(kind)[0], word) for word in words]
    if kind is bool:
        return _TRUTH.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _parse_field_type(flag_field: Field) -> tuple[type, tuple[str, ...], bool]:
    """Parse the annotation of a field.

    Returns:
        the plain type (`str` for a Literal), the allowed values of a Literal (else empty), and True
            if None is allowed.
    """
    optional = get_origin(flag_field.type) in (Union, UnionType)
    plain = (
        next(t for t in get_args(flag_field.type) if t is not NoneType)
        if optional
        else flag_field.type
    )
    if get_origin(plain) is Literal:
        return str, get_args(plain), optional
    return plain, (), optional


def _check_value(flag_field: Field, value: object, where: str) -> object:
    """Check a value; return it with the type of its field: a whole number may become a float.

    Numbers must be below 2^63, as the integers of torch are.

    Args:
        flag_field: field of a dataclass of flags.
        where: origin of the value, beginning of the message.
    Raises:
        UserError: naming `where`, the value and what is allowed.
    """
    kind, choices, optional = _parse_field_type(flag_field)
    if value is None and optional:
        return None
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if kind == list[float] and type(value) is list:
        value = [float(x) if type(x) is int and abs(x) < 2**63 else x for x in value]
    least, most = flag_field.metadata["least"], flag_field.metadata["most"]
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        is_valid = type(value) is list and value and all(type(x) is item for x in value)
        is_valid = is_valid and (item is str or all(abs(x) < 2**63 for x in value))
    else:
        is_valid = type(value) is kind and (not choices or value in choices)
    if is_valid and kind in (int, float):
        is_valid = abs(value) < 2**63  # neither of inf and nan is
        is_valid &= (least is None or value >= least) and (most is None or value <= most)
    if is_valid:
        return value
    allowed = f"one of {', '.join(choices)}" if choices else _NAMES[kind][1]
    allowed += f", {least} or more" if least is not None else ""
    allowed += f", {most} or less" if most is not None else ""
    raise UserError(
        f"{where}: {value!r} is not allowed; give {allowed}{' or none' if optional else ''}"
    )


# How help and messages name a type.
_NAMES = {
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text (in quotes, if YAML reads it as something else)"),
    bool: ("BOOL", "true or false"),
    list[str]: ("NAME", "a list of names"),
    list[float]: ("FLOAT", "a list of numbers"),
}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
