"""C: a folder that one process holds is refused to all others, at once; one of several wins."""

import pytest
from drills.commands import COMMANDS, make_workplace, read_tree
from drills.sizes import pick, report
from drills.warm import Command

from megamod.folder_lock import lock_folder, lock_folder_name

BY_NAME = ("merge", "preprocess", "convert")  # their folder appears complete
ROUNDS = pick(1, 6)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_held_folder_is_refused(name, warm, inputs, tmp_path, record_property):
    folder = make_workplace(tmp_path / "here", inputs)
    with lock_folder_name(folder / "out") if name in BY_NAME else lock_folder(folder / "out"):
        before = sorted(path.name for path in folder.rglob("*"))
        outcome = warm.run(Command(COMMANDS[name], str(folder)))
        assert outcome.code == 2, outcome.text
        assert "out: is in use by process" in outcome.text
        assert sorted(path.name for path in folder.rglob("*")) == before
    report(record_property, 1, 0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["merge", "preprocess", "dense", "classifier"])
def test_of_equal_commands_one_wins(name, warm, inputs, undisturbed, tmp_path, record_property):
    expected, _ = undisturbed(name)
    for number in range(ROUNDS):
        folder = make_workplace(tmp_path / str(number), inputs)
        command = Command(COMMANDS[name], str(folder))
        outcomes = [warm.wait(pid, 120) for pid in [warm.start(command) for _ in range(3)]]
        codes = [outcome.code for outcome in outcomes]
        assert set(codes) <= {0, 2} and 0 in codes, [outcome.text[-500:] for outcome in outcomes]
        for outcome in outcomes:
            # One that comes after the end of the first has nothing left to do, or may not write.
            refused = any(words in outcome.text for words in ("is in use", "exists already"))
            assert outcome.code == 0 or refused, outcome.text
        assert read_tree(folder / "out") == expected
    report(record_property, 3 * ROUNDS, 0)
