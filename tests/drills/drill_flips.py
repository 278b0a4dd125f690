"""V: flipped bits of data-bins, checkpoints and published, merged or converted models are found."""

import random

import pytest
from drills.commands import COMMANDS, make_workplace
from drills.sizes import SEED, pick, report
from drills.warm import Command

from megamod.data.lm.verify import check_databin
from megamod.states.verify import check_path

FLIPS = pick(60, 1000)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_flipped_bit_is_reported(warm, inputs, tmp_path, record_property):
    draw, files = random.Random(SEED), []
    for name, check in (
        ("preprocess", check_databin),
        ("merge", check_path),
        ("convert", check_path),
        ("demix", check_path),
        ("dense", check_path),
    ):
        folder = make_workplace(tmp_path / name, inputs)
        outcome = warm.run(Command(COMMANDS[name], str(folder)))
        assert outcome.code == 0, outcome.text
        parts = [folder / "out"]
        if name in ("demix", "dense"):
            parts = [folder / "out" / "model", *(folder / "out" / "checkpoints").glob("step-*")]
        for part in parts:
            assert not [fault for _, faults in check(part) for fault in faults]
            below = (file for file in part.rglob("*") if file.is_file())
            files.append([(check, part, file) for file in sorted(below)])
    missed = []
    for number in range(FLIPS):
        check, part, file = draw.choice(files[number % len(files)])
        original = file.read_bytes()
        if not original:
            continue
        flipped = bytearray(original)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            faults = [fault for _, faults in check(part) for fault in faults]
        except ValueError as error:  # a UserError: it is not even opened
            faults = [str(error)]
        if not faults:
            missed.append(str(file.relative_to(tmp_path)))
        file.write_bytes(original)
    report(record_property, FLIPS, len(missed))
    assert missed == []
