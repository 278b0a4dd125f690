"""Allowed imports between packages. docs/architecture.md shows the same table and says why."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LEAVES = {
    "megamod.schemas",
    "megamod.errors",
    "megamod.files",
    "megamod.folder_lock",
    "megamod.names",
    "megamod.progress",
    "megamod.tables",
}
DATA = {"megamod.data", "megamod.data.corpus", "megamod.data.lm", "megamod.data.tasks"}

# Room of the house -> rooms it may import, besides the leaves and itself; and outside packages,
# besides the standard library. The longest name that fits a module is its room.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    # Importing megamod installs the registration of the models, which runs once transformers loads.
    "megamod": ({"megamod.models", "megamod.evaluation", "megamod.version"}, set()),
    "megamod.version": (set(), set()),
    "megamod.errors": (set(), {"torch"}),
    "megamod.files": (set(), set()),
    "megamod.folder_lock": ({"megamod.errors", "megamod.files"}, set()),
    "megamod.progress": (set(), {"tqdm"}),
    "megamod.tables": (set(), set()),
    "megamod.names": ({"megamod.errors"}, {"pydantic"}),
    "megamod.schemas": ({"megamod.errors", "megamod.names"}, {"pydantic", "yaml"}),
    "megamod.command_line": ({"megamod.errors"}, {"argcomplete"}),
    "megamod.shipped_files": (set(), set()),
    "megamod.flags": ({"megamod.command_line"}, set()),
    "megamod.run_recipe": ({"megamod.flags"}, {"yaml"}),
    "megamod.args": ({"megamod.flags"}, set()),
    "megamod.dist.scope": (set(), set()),
    "megamod.dist.hostfile": (set(), set()),
    "megamod.dist": (
        {"megamod.dist.scope", "megamod.dist.hostfile"},
        {"torch", "deepspeed", "pydantic", "psutil"},
    ),
    "megamod_kernels": (set(), {"torch", "triton"}),
    "megamod.nn": ({"megamod_kernels", "megamod.dist.scope"}, {"torch", "transformers"}),
    "megamod.lm_eval": ({"megamod.states"}, {"lm_eval"}),
    "megamod.mixture.posterior": (set(), {"torch"}),
    "megamod.mixture": ({"megamod.mixture.posterior"}, {"torch", "pydantic"}),
    "megamod.models": (
        {"megamod.nn", "megamod_kernels", "megamod.states", "megamod.dist.scope"}
        | {"megamod.mixture.posterior"},
        {"torch", "transformers", "huggingface_hub", "safetensors", "peft"},
    ),
    # Each room of data imports only those before it: corpus, lm, tasks.
    "megamod.data": (set(), {"numpy", "torch"}),
    "megamod.data.corpus": (
        {"megamod.data"},
        {"numpy", "torch", "transformers", "tokenizers", "datasets", "sentencepiece", "pydantic"}
        | {"google", "pyarrow", "zstandard"},  # google: protobuf, of SentencePiece models
    ),
    "megamod.data.lm": (
        {"megamod.data", "megamod.data.corpus", "megamod.dist.scope"},
        {"numpy", "torch"},
    ),
    "megamod.data.tasks": (
        {"megamod.data", "megamod.data.corpus", "megamod.data.lm"},
        {"numpy", "torch", "transformers", "datasets", "pydantic", "safetensors", "pyarrow"},
    ),
    "megamod.states": (
        {"megamod.dist.scope"},
        {"torch", "safetensors", "pydantic", "huggingface_hub"},
    ),
    "megamod.convert": (
        {"megamod", "megamod.models", "megamod.states", "megamod.dist.scope"},
        {"torch", "safetensors", "transformers", "huggingface_hub"},
    ),
    "megamod.evaluation": (
        DATA
        | {"megamod.convert"}
        | {"megamod.models", "megamod.mixture", "megamod.mixture.posterior"}
        | {"megamod.run_recipe", "megamod.states"},
        {"torch", "transformers", "matplotlib", "numpy", "scipy", "sklearn", "safetensors"},
    ),
    "megamod.serving": (
        {"megamod.evaluation", "megamod.run_recipe", "megamod.states", "megamod.version"},
        {"torch", "fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"},
    ),
    "megamod.train": (
        DATA
        | {"megamod.version", "megamod.args", "megamod.flags", "megamod.dist", "megamod.dist.scope"}
        | {"megamod.run_recipe", "megamod.models", "megamod.nn", "megamod.states"},
        {"torch", "transformers", "deepspeed", "safetensors", "psutil", "tqdm", "wandb"},
    ),
    # Alignment runs models, so it is imported only where a recipe asks for it.
    "megamod.merging.tensors": ({"megamod.states"}, {"torch"}),
    # Imported where a configuration or a name leaves a question open.
    "megamod.merging.known_models": (
        {"megamod", "megamod.models", "megamod.merging.tensors"},
        {"torch", "transformers"},
    ),
    "megamod.merging": (
        {"megamod.version", "megamod.states", "megamod.convert", "megamod.merging.alignment"}
        | {"megamod.merging.tensors", "megamod.merging.known_models"},
        {"torch", "pydantic", "tqdm"},
    ),
    # Configurations of mixtures of experts are built by their classes.
    "megamod.merging.moe": (
        {"megamod.merging", "megamod.merging.tensors", "megamod.models"}
        | {"megamod.states", "megamod.version"},
        {"torch", "transformers", "safetensors"},
    ),
    "megamod.merging.alignment": (
        {"megamod", "megamod.convert", "megamod.dist.scope", "megamod.states"}
        | {"megamod.models"}
        | {"megamod.merging.tensors"}
        | {"megamod.data", "megamod.data.corpus"},
        {"torch", "transformers", "safetensors", "numpy", "scipy", "pydantic", "psutil"},
    ),
    "megamod.btm": (
        {"megamod.args", "megamod.flags", "megamod.dist.scope", "megamod.dist.hostfile"}
        | {"megamod.data.corpus", "megamod.data.lm", "megamod.merging", "megamod.mixture"}
        | {"megamod.run_recipe", "megamod.states"},
        {"torch", "safetensors", "psutil"},
    ),
    "megamod.runs": (
        DATA
        | {"megamod.args", "megamod.flags", "megamod.dist", "megamod.dist.scope"}
        | {"megamod.models", "megamod.btm", "megamod.merging", "megamod.merging.alignment"}
        | {"megamod.merging.moe", "megamod.run_recipe"}
        | {"megamod.evaluation", "megamod.mixture", "megamod.states", "megamod.train"}
        | {"megamod.convert", "megamod.version"},
        {"torch", "transformers", "deepspeed", "huggingface_hub", "numpy", "pydantic"},
    ),
    "megamod.planning": (
        {"megamod.args", "megamod.flags", "megamod.btm", "megamod.dist", "megamod.dist.scope"}
        | {"megamod.data.corpus", "megamod.dist.hostfile", "megamod.models", "megamod.states"}
        | {"megamod.train"},
        {"torch", "transformers", "matplotlib"},
    ),
}
# Commands may import every room; the console command imports commands alone.
MAY_IMPORT["megamod.commands"] = (
    {*MAY_IMPORT},
    {"torch", "transformers"},
)
MAY_IMPORT["megamod.__main__"] = (
    {"megamod.command_line", "megamod.commands", "megamod.version"},
    {"argcomplete"},
)
SOURCES = sorted(
    path
    for root in ("megamod", "kernels", "launchers")
    for path in (REPOSITORY / root).rglob("*.py")
)
ALL_PYTHON = SOURCES + sorted((REPOSITORY / "tests").rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "megamod")] + sorted(
    (REPOSITORY / "kernels" / "megamod_kernels").rglob("*.py")
)


def name_of(path: Path) -> str:
    """The import name of a source file of a package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The longest entry of the table that a module is or lies in."""
    fitting = [room for room in MAY_IMPORT if module == room or module.startswith(room + ".")]
    return max(fitting, key=len)


def imported(tree: ast.AST) -> set[tuple[int, str]]:
    """Line and module of all imports, those inside functions too."""
    result: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            result |= {(node.lineno, module) for module in from_modules(node)}
    return result


def from_modules(node: ast.ImportFrom) -> set[str]:
    """`from megamod.data import lm` is an import of megamod.data.lm if that is a module."""
    deeper = {f"{node.module}.{alias.name}" for alias in node.names}
    known = {name_of(path) for path in LIBRARY}
    return {name if name in known else node.module for name in deeper}


def violations(module: str, tree: ast.AST) -> list[str]:
    """Imports of a module that its room may not have."""
    room = room_of(module)
    ours, others = MAY_IMPORT[room]
    bad = []
    for line, target in sorted(imported(tree)):
        top = target.partition(".")[0]
        if top in ("megamod", "megamod_kernels"):
            existing = room_of(target)
            leaves = set() if room in LEAVES | {"megamod_kernels"} else LEAVES
            allowed = existing in ours | leaves | {room}
        else:
            allowed = top in sys.stdlib_module_names or top in others
        if not allowed:
            bad.append(f"{module}, line {line}: {room} may not import {target}")
    return bad


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_nothing_imports_upwards(path):
    assert violations(name_of(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("megamod.nn.demix", "import deepspeed", False),
        ("megamod.nn.demix", "import megamod_kernels", True),
        ("megamod.models.auto", "from megamod.dist import scope", True),
        ("megamod.models.auto", "from megamod.dist import process", False),
        ("megamod.models.auto", "def f():\n    from megamod.dist.process import get_rank", False),
        ("megamod.data.lm.batches", "from megamod.models.auto import build_lm", False),
        ("megamod.data.lm.batches", "from megamod.files import hash_file", True),
        (
            "megamod.data.corpus.documents",
            "from megamod.data.lm.order import BalancedSampler",
            False,
        ),
        ("megamod.data.lm.order", "from megamod.data.tasks.specs import find_any_task", False),
        ("megamod.data.tasks.specs", "from megamod.data.lm.order import BalancedSampler", True),
        ("megamod.files", "from megamod.errors import UserError", False),
        ("megamod.dist.hostfile", "from megamod.tables import format_table", True),
        ("megamod.evaluation.plots", "from megamod.train.loop import train", False),
        ("megamod.train.loop", "from megamod.evaluation import plots", False),
        ("megamod_kernels", "from megamod.errors import UserError", False),
        ("megamod.states.weights", "import numpy", False),
        ("megamod.dist.scope", "import torch", False),
    ],
)
def test_the_rule_itself(module, line, allowed):
    assert (violations(module, ast.parse(line)) == []) is allowed


def test_no_circle_of_imports():
    """Imports inside functions count too. `megamod` alone is left out: it registers the models."""
    files = {name_of(path): path for path in LIBRARY}
    graph = {
        name: {
            target
            for _, target in imported(ast.parse(path.read_text(encoding="utf-8")))
            if target in files and target not in (name, "megamod")
        }
        for name, path in files.items()
    }
    assert sum(map(len, graph.values())) > 500
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_commands_import_what_is_installed():
    """Jobs run commands as files, so their folder comes first on the path: a command's name must
    not hide a module, nor be one.
    """
    launchers = sorted((REPOSITORY / "megamod" / "commands").glob("[!_]*.py"))
    names = {path.stem for path in launchers}
    for path in launchers:
        for line, target in imported(ast.parse(path.read_text(encoding="utf-8"))):
            assert target.partition(".")[0] not in names, f"{path.name}, line {line}: {target}"


def test_source_roots_are_not_packages():
    """A `kernels` package would hide the distribution of that name, which transformers imports."""
    for folder in ("kernels", "launchers", "tests"):
        result = sorted((REPOSITORY / folder).glob("__init__.py"))
        result += sorted((REPOSITORY / folder / "bench").glob("__init__.py"))
        assert result == []


def test_every_file_has_a_name_and_a_size():
    for path in ALL_PYTHON:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = 180 if path.parent.name == "commands" and path in SOURCES else 450
        assert lines <= limit, f"{path.relative_to(REPOSITORY)} has {lines} lines, over {limit}"
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def test_test_files_are_told_apart_by_name():
    """Without packages, pytest imports test files by their bare names. `run.py` are commands."""
    paths = (REPOSITORY / "tests").rglob("*.py")
    names = [path.name for path in paths if path.name != "run.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


BLOCKED = """
import sys
sys.modules |= dict.fromkeys({blocked!r})  # to imports and to searches as if not installed
"""


def without(blocked: set[str], program: str) -> str:
    """Output of a program in a Python where some packages cannot be imported."""
    code = BLOCKED.format(blocked=blocked) + program
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_megamod_is_free():
    heavy = {"torch", "transformers", "deepspeed", "numpy"}
    assert without(heavy, "import megamod; print(megamod.__version__)").strip()


def test_models_run_without_what_a_gpu_machine_may_lack():
    modules = [
        name
        for path in LIBRARY
        if (name := name_of(path)).startswith(("megamod.nn", "megamod.models"))
    ]
    program = f"""
import importlib
import megamod, megamod_kernels
for name in {modules!r}:
    importlib.import_module(name)
import torch
from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
config = DemixConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                     max_position_embeddings=4, domains=["a", "b"], untie="feedforward")
model = DemixForCausalLM(config)
initialise_lm_weights(model, seed=0)
ids = torch.tensor([[3, 4, 5, 6]])
loss = model(ids, labels=ids, domain="b").loss
loss.backward()
logits = model(ids, domain="b").logits[0, :-1]
print(float(loss), float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
"""
    assert len(modules) > 5
    loss, plain = without({"deepspeed", "datasets", "matplotlib", "triton"}, program).split()
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


def test_deepspeed_stays_where_it_belongs():
    output = without(
        {"deepspeed"},
        "import megamod.data.lm.pretraining, megamod.states.weights\n"
        "import megamod.evaluation.model_folders, megamod.evaluation.perplexity_report\n"
        "import megamod.args, megamod.dist.scope\n"
        "print('fine')",
    )
    assert output == "fine\n"
