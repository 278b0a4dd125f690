"""Merge methods, one function each. Importing the package enters all of them into the table."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
