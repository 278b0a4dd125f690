"""Environment of the whole suite: CPU, one thread, no network; what tests of kernels need."""

import atexit
import functools
import json
import os
import shutil
import tempfile

import pytest

try:
    import hypothesis
except ModuleNotFoundError:  # tests that need a GPU do without
    hypothesis = None

LONGEST = ("test_forest.py", "test_resume.py", "test_pretrain.py", "test_sharing.py")
LONGEST += ("test_loop.py", "test_btm.py", "test_demux.py", "test_planning_recipes.py")
LONGEST += ("test_two_hosts.py", "test_mixture_pretrain.py", "test_lora_runs.py")
LONGEST += ("test_checkpoint.py", "drill_kills.py", "drill_cuts.py", "drill_ranks.py")

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="megamod-extensions-")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)

# An example may take long on a machine that does other things too.
if hypothesis is not None:
    hypothesis.settings.register_profile("megamod", deadline=None)
    hypothesis.settings.load_profile("megamod")


def pytest_configure(config):
    """Kernels run on the CPU, by Triton's interpreter, unless tests of a GPU were asked for.

    Triton reads the variable when it is loaded, so one process does the one or the other.
    """
    asked = config.getoption("markexpr")
    if "gpu" not in asked or "not gpu" in asked:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that no core waits for the last of them.

    pytest-xdist keeps this order with --no-loadscope-reorder alone.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def rounding(monkeypatch):
    """Stores in bfloat16 round to nearest, as on a GPU; the interpreter would truncate.

    Truncation doubles the error of a store, and so would hide whether a kernel is as near to
    float64 as plain operations are.
    """
    import numpy as np
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(inputs, given_type, wanted_type, mode):
        if (given_type, wanted_type) != (tl.float32, tl.bfloat16):
            return convert(inputs, given_type, wanted_type, mode)
        exact = torch.from_numpy(np.ascontiguousarray(inputs).view(np.float32))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(inputs.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    import torch

    def poison(owner, name):
        allocate = getattr(owner, name)

        def filled(*args, **more):
            built = allocate(*args, **more)
            return built.fill_(torch.nan) if built.is_floating_point() else built

        monkeypatch.setattr(owner, name, filled)

    poison(torch, "empty")
    poison(torch, "empty_like")
    poison(torch.Tensor, "new_empty")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium, see browser.py; tests that use it are skipped without one."""
    from browser import open_browser

    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def browser(chromium):
    """The Chromium of the session, without errors of earlier pages."""
    from browser import list_errors

    list_errors(chromium)
    return chromium


@pytest.fixture(scope="session", autouse=True)
def shared(tmp_path_factory):
    """A folder that all workers of pytest-xdist share, with the warm process of launch.py."""
    from launch import SESSIONS

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["MEGAMOD_TEST_SHARED"] = str(folder)
    with SESSIONS:
        yield folder


@pytest.fixture(scope="session")
def warm(shared):
    """A session of the warm process, see drills/warm.py."""
    from launch import open_warm_session

    return open_warm_session()


@pytest.fixture(scope="session")
def inputs(shared):
    """Folder with the inputs of all commands of drills/commands.py."""
    from drills.commands import make_inputs
    from drills.warm import hold

    folder = shared / "drill-inputs"
    with hold(shared / "inputs.lock"):
        return folder if folder.exists() else make_inputs(folder)


@pytest.fixture(scope="session")
def undisturbed(warm, inputs, shared):
    """From a command to the digests of what it writes, and the number of its sites."""
    from drills.commands import COMMANDS, make_workplace, read_tree
    from drills.warm import Command, hold

    @functools.cache
    def run(name: str) -> tuple[dict[str, str], int]:
        record = shared / f"undisturbed-{name}.json"
        with hold(record.with_suffix(".lock")):
            if not record.exists():
                folder = make_workplace(shared / f"undisturbed-{name}", inputs)
                outcome = warm.run(Command(COMMANDS[name], str(folder)))
                assert outcome.code == 0, outcome.text
                record.write_text(json.dumps([read_tree(folder / "out"), outcome.sites]))
        return tuple(json.loads(record.read_text()))

    return run
