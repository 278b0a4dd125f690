"""Names that become parts of the names of files and parameters: checks, and types for schemas.

`check_name` and `check_domain` check a name from the command line, or from a file that was read
before; the types `Name` and `Domain` check a field of a `Schema`.
"""

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from megamod.errors import UserError, shorten

_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.+-]{1,100}")
_DOMAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")


def check_name(name: str, origin: str) -> str:
    """Return `name` if it can be part of a file's name, see `is_name`.

    Args:
        origin: origin of the name, for the message.
    Raises:
        UserError: if it cannot.
    """
    return _parse_or_refuse(parse_name, name, origin)


def check_domain(name: str, origin: str) -> str:
    """Return `name` if it can be that of a domain, see `is_domain`.

    Args:
        origin: origin of the name, for the message.
    Raises:
        UserError: if it cannot.
    """
    return _parse_or_refuse(parse_domain, name, origin)


def is_name(name: str) -> bool:
    """Return True for 1 to 100 letters of ASCII, digits, _ . + and -, the first not a dot."""
    return _NAME.fullmatch(name) is not None


def is_domain(name: str) -> bool:
    """Return True for 1 to 100 letters of ASCII, digits, _ and -.

    A dot would divide a parameter's name, of which the domain is one component.
    """
    return _DOMAIN.fullmatch(name) is not None


def parse_name(value: object) -> str:
    """Return a value from a file as a name: text as it is, a number as text.

    YAML reads `1` as a number. A validator, for the type `Name`.

    Raises:
        ValueError: if it is neither text nor a number, or cannot be part of a file's name, see
            `is_name`.
    """
    text = str(value) if type(value) in (int, float) else value
    if not isinstance(text, str) or not is_name(text):
        raise ValueError(
            f"{shorten(value)} is not made of letters, digits, _ . + and - (at most 100, the first "
            "not a dot)"
        )
    return text


def parse_domain(name: str) -> str:
    """Return `name` if it can be that of a domain, see `is_domain`; for the type `Domain`.

    Raises:
        ValueError: if it cannot.
    """
    if not is_domain(name):
        raise ValueError(f"{shorten(name)} is not made of letters, digits, _ and - (at most 100)")
    return name


def _parse_or_refuse(parse: Callable[[str], str], name: str, origin: str) -> str:
    """Parse a name, with the parser's ValueError as a UserError that begins with `origin`."""
    try:
        return parse(name)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


Name = Annotated[str, BeforeValidator(parse_name)]
"""A name that becomes part of a file's name."""
Domain = Annotated[str, AfterValidator(parse_domain)]
"""The name of a domain, which becomes part of the names of files and parameters."""
