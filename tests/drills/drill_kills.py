"""K: commands that are killed at a call that changes the disk, or at any instant, and run again.

In the end they have written what they write undisturbed, bit for bit: weights, optimizers, tables
and logs with every step once. Nothing of a killed process is left.
"""

import random
import time

import pytest
from drills.commands import COMMANDS, list_leftovers, make_workplace, read_tree
from drills.sizes import SEED, SIZE, pick, report
from drills.warm import KILLED, Command, Outcome, Warm

KILLS = pick(2, 24)  # of each command
AGAIN = 3  # kills of a run, one after the other, before it may end
IN_A_PUSH = ("merge", "preprocess", "demix", "classifier")
NAMES = tuple(COMMANDS) if SIZE == "nightly" else IN_A_PUSH


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_killed_commands_write_what_others_write(
    name, warm, inputs, undisturbed, tmp_path, record_property
):
    draw = random.Random(f"{SEED} {name}")
    expected, sites = undisturbed(name)
    kills, runs, lost = 0, 0, []
    while kills < KILLS:
        folder, runs = make_workplace(tmp_path / str(runs), inputs), runs + 1
        events = []
        for _ in range(AGAIN):
            event = draw.randrange(sites) if draw.random() < 0.7 else draw.uniform(0, 2.5)
            events.append(event)
            outcome = _kill(warm, name, str(folder), event)
            kills += outcome.code == KILLED
            if outcome.code != KILLED:
                break
        else:
            outcome = warm.run(Command(COMMANDS[name], str(folder)))
        # A command that was killed after its output was complete may refuse to write it again.
        if outcome.code != 0 and not (outcome.code == 2 and "exists already" in outcome.text):
            lost.append((events, outcome.code, outcome.text[-1000:]))
            continue
        tree, left = read_tree(folder / "out"), list_leftovers(folder)
        different = [key for key in expected | tree if expected.get(key) != tree.get(key)]
        if different or left:
            lost.append((events, different, left))
    report(record_property, kills, len(lost))
    assert lost == []


def _kill(warm: Warm, name: str, folder: str, event: int | float) -> Outcome:
    """Run a command and kill it before a call (a whole number) or after seconds."""
    if isinstance(event, int):
        return warm.run(Command(COMMANDS[name], folder, site=event))
    pid = warm.start(Command(COMMANDS[name], folder))
    time.sleep(event)
    warm.kill(pid)
    return warm.wait(pid)
