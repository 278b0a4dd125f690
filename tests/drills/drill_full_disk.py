"""Q: a disk that is full from some call on, and a folder that cannot be written at all.

A command then ends with exit code 2 and one sentence, or goes on without what it can do without. It
leaves nothing half-written, and the same command ends as undisturbed once there is space again.
"""

import random

import pytest
from drills.commands import COMMANDS, list_leftovers, make_workplace, read_tree
from drills.sizes import SEED, SIZE, pick, report
from drills.warm import Command

PHASES = pick(2, 20)  # of each command
IN_A_PUSH = ("merge", "preprocess", "dense", "classifier")
NAMES = tuple(COMMANDS) if SIZE == "nightly" else IN_A_PUSH


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_at_any_phase(name, warm, inputs, undisturbed, tmp_path, record_property):
    draw = random.Random(f"{SEED} {name}")
    expected, sites = undisturbed(name)
    phases = sorted(draw.sample(range(sites), min(PHASES, sites)))
    lost = []
    for number, phase in enumerate([0, *phases]):
        folder = make_workplace(tmp_path / str(number), inputs)
        event = "full" if number else "read-only"
        outcome = warm.run(Command(COMMANDS[name], str(folder), phase, event))
        message = outcome.text.strip().splitlines()[-1:] or [""]
        if not outcome.is_clean or (outcome.code == 0 and phase == 0):
            lost.append((event, phase, outcome.code, outcome.text[-1500:]))
            continue
        if outcome.code == 2 and not any(word in message[0] for word in ("Error: ", "  ")):
            lost.append((event, phase, "no message", outcome.text[-300:]))
        again = warm.run(Command(COMMANDS[name], str(folder)))
        tree, left = read_tree(folder / "out"), list_leftovers(folder)
        different = [key for key in expected | tree if expected.get(key) != tree.get(key)]
        if again.code != 0 or different or left:
            lost.append((event, phase, again.code, different, left, again.text[-600:]))
    report(record_property, 1 + len(phases), len(lost))
    assert lost == []
