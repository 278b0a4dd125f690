"""Size and seed of the drills: small with every push, large at night, set by run.py.

A share of the night is a night with fewer cases, where it has more than a push.
"""

import os

SIZE = os.environ.get("MEGAMOD_DRILL_SIZE", "push")
SHARE = float(os.environ.get("MEGAMOD_DRILL_SHARE", "1"))
SEED = int(os.environ.get("MEGAMOD_DRILL_SEED", "1"))


def pick(push: int, nightly: int) -> int:
    """The number of cases in this size."""
    return max(push, int(nightly * SHARE)) if SIZE == "nightly" else push


def report(record_property, cases: int, lost: int) -> None:
    """Tell run.py how many cases there were, and how many of them lost something."""
    record_property("cases", cases)
    record_property("lost", lost)
