"""The installed packages: two of ours, their licence, and everything that they import."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import find_packages

import megamod

REPOSITORY = Path(__file__).resolve().parents[1]
# Imported by name here, brought along by a package that is declared and needs it itself.
BROUGHT_BY = {
    "huggingface-hub": "transformers",
    "tokenizers": "transformers",
    "protobuf": "tensorboard",
    "starlette": "fastapi",
}


def setup_lists() -> dict[str, list[str]]:
    """The constants of setup.py."""
    lists = {}
    for node in ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    return lists


def declared() -> dict[str, Requirement]:
    """Return the requirements of an installation, and the optional ones except for developers."""
    lists = setup_lists()
    names = ("CORE", "TRITON", "COMPLETION", "EVAL", "SERVE", "WANDB")
    expected = [Requirement(text) for name in names for text in lists[name]]
    return {canonicalize_name(item.name): item for item in expected}


def pins() -> dict[str, Version]:
    """The exact versions of constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in rows}


def test_exactly_two_packages_and_all_their_parts():
    result = find_packages(str(REPOSITORY), include=["megamod", "megamod.*"])
    folders = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in (REPOSITORY / "megamod").rglob("*.py")
    }
    assert set(result) == folders, "a folder without __init__.py would be left out of the wheel"
    assert find_packages(str(REPOSITORY / "kernels"), include=["megamod_kernels*"]) == [
        "megamod_kernels"
    ]


def test_every_import_is_declared():
    distributions = packages_distributions()
    known, missing = declared(), {}
    for root in ("megamod", "kernels/megamod_kernels", "launchers"):
        for path in (REPOSITORY / root).rglob("*.py"):
            for top in imports(ast.parse(path.read_text(encoding="utf-8"))):
                if top in sys.stdlib_module_names or top in ("megamod", "megamod_kernels"):
                    continue
                names = {canonicalize_name(name) for name in distributions.get(top, [top])}
                if not names & (known.keys() | BROUGHT_BY.keys()):
                    missing.setdefault(top, path.name)
    assert missing == {}


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all imports of a file."""
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            result.add(node.module.partition(".")[0])
    return result


def test_what_is_brought_along_really_is():
    for name, by in BROUGHT_BY.items():
        needed = [Requirement(text) for text in requires(by)]
        assert name in {canonicalize_name(item.name) for item in needed if "extra" not in str(item)}
        assert by in declared()


def test_pins_lie_in_the_ranges():
    pinned = pins()
    for name, requirement in declared().items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, f"{pinned[name]} is outside {requirement}"
    exact = [str(item) for item in declared().values() if "==" in str(item.specifier)]
    assert exact == [], "a library is not pinned; constraints.txt is there for that"


def test_versions_and_build_settings():
    # `setup.py` reads the version from the source of megamod/version.py, docstring and all.
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == [megamod.__version__], done.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+", megamod.__version__)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    # An older setuptools makes an editable install that lacks megamod_kernels.
    (needed,) = (Requirement(text) for text in settings["build-system"]["requires"])
    assert needed.name == "setuptools" and Version("76") not in needed.specifier
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert len(licence.splitlines()) > 190


def test_installed_for_every_folder_and_nothing_else(tmp_path):
    """From an empty folder both packages import; the repository's other folders do not."""
    program = (
        "import importlib.util as u, megamod, megamod_kernels\n"
        "names = ('launchers', 'megamod', 'megamod_kernels', 'kernels.megamod_kernels')\n"
        "def there(name):\n"
        "    try: return u.find_spec(name) is not None\n"
        "    except ModuleNotFoundError: return False\n"
        "print([name for name in names if there(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['megamod', 'megamod_kernels']", done.stderr


def list_extras() -> set[str]:
    """Names of the optional parts of an installation."""
    text = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(\w+)": (?:DEV|[A-Z]+)\b', text.partition("extras_require")[2]))


def check_requirement(text: str) -> None:
    """The current folder, or a package with a pin, is what pip is to install."""
    path, _, extras = text.strip("'").partition("[")
    if path == ".":
        assert set(extras.rstrip("]").split(",")) <= list_extras(), text
    else:
        assert canonicalize_name(path) in pins(), text


def is_supported(python: str) -> bool:
    """True for a version of Python that the package and its workflow name."""
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    return python in workflow["jobs"]["ci"]["strategy"]["matrix"]["python"]


def test_the_container_agrees_with_the_package():
    """Building needs docker and a network: the file is compared with what it installs."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line.split() for line in re.sub(r"\\\n *", "", text).splitlines() if line.strip()]
    assert {line[0] for line in lines} <= {
        *("#", "ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT")
    }
    assert is_supported(re.search(r"^ARG PYTHON=(\S+)$", text, re.M)[1])
    stages = {}
    for line in lines:
        if line[0] == "FROM":
            assert line[1] in (*stages, "scratch") or line[1].startswith("python:"), line
            copied = stages.setdefault(line[3], list(stages.get(line[1], [])))
        if line[0] == "COPY" and line[1].startswith("--from="):
            assert line[2:] == ["/", "./"], line
            copied += stages[line[1].removeprefix("--from=")]
        elif line[0] == "COPY":
            copied += line[1:-1]
            assert all((REPOSITORY / name).exists() for name in line[1:-1]), line
        if line[:3] == ["RUN", "pip", "install"]:
            words = iter(line[3:])
            for word in words:
                if word in ("-c", "--index-url"):
                    value = next(words)
                    assert word != "-c" or value in copied
                else:
                    check_requirement(word)
    # Both images contain all files that setup.py reads and packs.
    packed = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    packed |= {"megamod", "kernels", "launchers", "ds_configs"}
    for target in ("cpu", "cuda"):
        assert packed <= set(stages[target])
    assert text.count('ENTRYPOINT ["megamod"]') == 2


def test_the_environment_of_conda_agrees_with_the_package():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    (python,) = [item for item in environment["dependencies"] if str(item).startswith("python=")]
    assert environment["name"] == "megamod" and is_supported(python.partition("=")[2])
    constraint, package = environment["dependencies"][-1]["pip"]
    assert constraint.split() == ["--constraint", "constraints.txt"]
    assert package.split()[0] == "--editable"
    check_requirement(package.split()[1])
