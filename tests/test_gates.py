"""Rules for every file: no running of data, no machine's paths, no missing docstring."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SELF = Path(__file__).resolve()

# Calls that run or trust what they read, and what to use in their place. A call is written as in
# the source, `*.` for any object.
FORBIDDEN_CALLS = {
    "eval": "a table of the values that are meant",
    "exec": "a function",
    "compile": "a function",
    "__import__": "importlib.import_module with a fixed name",
    "yaml.load": "yaml.safe_load",
    "yaml.full_load": "yaml.safe_load",
    "yaml.unsafe_load": "yaml.safe_load",
    "os.system": "subprocess with a list of arguments",
    "os.popen": "subprocess with a list of arguments",
    "*.all_gather_object": "tensors, megamod.dist.process.gather_texts",
    "*.gather_object": "tensors, megamod.dist.process.gather_texts",
    "*.broadcast_object_list": "tensors, megamod.dist.process.broadcast_from_rank_0",
    "*.scatter_object_list": "tensors",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

# Allowed all the same: (file, call or module) -> why.
ALLOWED = {
    ("megamod/convert/reading.py", "pickle"): "for the name of the error torch.load raises",
    ("tests/convert/test_reading.py", "pickle"): "makes the hostile files that must be refused",
}

# Folders that exist on one machine or in one account only.
MACHINE_PATHS = re.compile(r"(?<![\w.~$}-])/(?:home|root|Users|work|mnt|data|scratch|tmp)/\w")
ALLOWED_PATHS: dict[tuple[str, str], str] = {}

GENERATED = {".venv", ".git", "runs", "build", "megamod.egg-info", "__pycache__"}
GENERATED |= {".pytest_cache", ".ruff_cache", ".hypothesis", "dist-wheels"}
TEXT = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".txt", ".example", ".csv", ""}


def tree_files() -> list[Path]:
    """Every file of the working tree that git does not ignore."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        result = [REPOSITORY / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        result = [
            path
            for path in REPOSITORY.rglob("*")
            if not GENERATED & set(path.relative_to(REPOSITORY).parts)
        ]
    return sorted(path for path in result if path.is_file())


FILES = tree_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
PUBLIC = [path for path in PYTHON if "tests" not in path.relative_to(REPOSITORY).parts[:1]]


def label(path: Path) -> str:
    """A file's path in the repository."""
    return str(path.relative_to(REPOSITORY))


def spelled(function: ast.expr) -> str:
    """The called expression as in the source, `a.b.c`."""
    return ast.unparse(function)


def forbidden(tree: ast.AST) -> list[tuple[int, str, str]]:
    """Line, what is there, what to do instead."""
    result = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {(node.module or "").partition(".")[0]}
        else:
            modules = set()
        result += [
            (node.lineno, module, "safetensors or JSON") for module in modules & FORBIDDEN_MODULES
        ]
        if isinstance(node, ast.Call):
            result += [(node.lineno, *bad) for bad in forbidden_call(node)]
    return result


def forbidden_call(node: ast.Call) -> list[tuple[str, str]]:
    """Return the faults of one call."""
    name, keywords = spelled(node.func), {k.arg: k.value for k in node.keywords}
    last = "*." + name.rpartition(".")[2]
    bad = [(name, FORBIDDEN_CALLS[key]) for key in (name, last) if key in FORBIDDEN_CALLS]
    if name == "torch.load" and not is_true(keywords.get("weights_only")):
        bad.append((name, "weights_only=True"))
    if name.endswith("np.load") and "allow_pickle" in keywords:
        bad.append((name, "no allow_pickle"))
    if "shell" in keywords and not is_false(keywords["shell"]):
        bad.append((f"{name}(shell=...)", "a list of arguments"))
    if "trust_remote_code" in keywords and not is_false(keywords["trust_remote_code"]):
        bad.append((f"{name}(trust_remote_code=...)", "nothing: it runs what it downloads"))
    return bad


def asking(tree: ast.AST) -> list[int]:
    """Lines where transformers may ask on standard input if it should run the code of a folder."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.fullmatch(r"(\w+\.)*[Aa]uto\w*\.from_pretrained", spelled(node.func))
        and not any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
    ]


@pytest.mark.parametrize("path", PUBLIC, ids=label)
def test_nothing_asks_about_code_of_folders(path):
    assert asking(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_questions_are_found():
    assert asking(ast.parse("AutoConfig.from_pretrained(x)\nauto.from_pretrained(x)")) == [1, 2]
    assert asking(ast.parse("AutoModel.from_pretrained(x, trust_remote_code=False)")) == []


def is_true(value: ast.expr | None) -> bool:
    """The literal True."""
    return isinstance(value, ast.Constant) and value.value is True


def is_false(value: ast.expr) -> bool:
    """The literal False."""
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", PYTHON, ids=label)
def test_nothing_runs_what_it_reads(path):
    result = forbidden(ast.parse(path.read_text(encoding="utf-8")))
    assert [
        f"{label(path)}, line {line}: {what}; use {instead}"
        for line, what, instead in result
        if (label(path), what) not in ALLOWED
    ] == []


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("def f():\n    import pickle", True),
        ("eval('1')", True),
        ("model.eval()", False),
        ("exec('x = 1')", True),
        ("yaml.load(text, Loader=yaml.SafeLoader)", True),
        ("yaml.safe_load(text)", False),
        ("subprocess.run('ls', shell=True)", True),
        ("subprocess.run('ls', shell=flag)", True),
        ("subprocess.run(['ls'], shell=False)", False),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("dist.all_gather_object(rows, row)", True),
        ("torch.distributed.broadcast_object_list(rows)", True),
        ("dist.all_gather(rows, row)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", True),
        ("torch.compile(model)", False),
        ("re.compile('a')", False),
        ("np.load(path, allow_pickle=True)", True),
    ],
)
def test_the_search_itself(line, caught):
    assert bool(forbidden(ast.parse(line))) is caught


def test_exceptions_are_still_needed():
    """An exception that nothing uses is a door left open."""
    used = {
        (label(path), what)
        for path in PYTHON
        for _, what, _ in forbidden(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert set(ALLOWED) <= used
    assert all(len(reason) > 20 for reason in (ALLOWED | ALLOWED_PATHS).values())


def test_no_file_names_this_machine():
    result = []
    for path in FILES:
        if path == SELF or path.suffix not in TEXT:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            match = MACHINE_PATHS.search(line)
            if match and (label(path), match[0]) not in ALLOWED_PATHS:
                result.append(f"{label(path)}, line {number}: {line.strip()[:80]}")
    assert result == []


def test_machine_paths_are_told_from_others():
    machine = ("open('/home/ann/x')", "/tmp/x", "--data /scratch/a", "cd /root/main")
    assert all(MACHINE_PATHS.search(text) for text in machine)
    others = (
        "runs/data/bin",
        "https://host/data/set",
        "$OUT/tmp/x",
        "~/data/x",
        "a/tmp/b",
        "/etc/x",
    )
    assert not any(MACHINE_PATHS.search(text) for text in others)


def undocumented(tree: ast.Module) -> list[tuple[int, str]]:
    """Public functions and classes of a file without a docstring, and methods of public classes.

    One-line functions, properties and methods of classes with foreign bases need none, nor does a
    method that another class of the file documents.
    """
    missing = [] if ast.get_docstring(tree) else [(1, "the file itself")]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    documented = {m.name for c in classes for m in methods(c) if ast.get_docstring(m)}
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
        if not ast.get_docstring(node) and not short:
            missing.append((node.lineno, node.name))
        if isinstance(node, ast.ClassDef) and not node.bases:
            missing += [
                (method.lineno, f"{node.name}.{method.name}")
                for method in methods(node)
                if method.name not in documented
                and len(method.body) > 1
                and not is_property(method)
            ]
    return missing


def is_property(node: ast.FunctionDef) -> bool:
    """True for a method read like an attribute."""
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """The public methods of a class."""
    return [
        part
        for part in node.body
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
    ]


@pytest.mark.parametrize("path", PUBLIC, ids=label)
def test_what_is_public_is_described(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [f"{label(path)}, line {line}: {name}" for line, name in undocumented(tree)] == []


def test_undescribed_things_are_found():
    tree = ast.parse(
        '"""File."""\n'
        "def documented():\n    'Yes.'\n"
        "def short(): ...\n"
        "def bare():\n    x = 1\n    return x\n"
        "def _private(): ...\n"
        "class Plain:\n    'Yes.'\n    def method(self):\n        x = 1\n        return x\n"
        "    def short(self): ...\n    def _own(self):\n        x = 1\n        return x\n"
        "class Module(Base):\n    'Yes.'\n    def forward(self): ...\n"
    )
    assert [name for _, name in undocumented(tree)] == ["bare", "Plain.method"]


# Variable names that say nothing of what they hold, and first words of docstrings that describe a
# question and not the code. CONTRIBUTING.md has the words to use.
EMPTY_NAMES = {"found", "told", "given", "there", "own", "one", "made", "wanted", "place"}
QUESTIONS = re.compile(r"(What|Which|Whether|How|For whom|As many|Who|Where)\b")


def wording(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and word of variables with an empty name, and of docstrings that start as a question."""
    bad = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in EMPTY_NAMES:
            bad.append((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bad += [(node.lineno, node.id)] if node.id in EMPTY_NAMES else []
        elif isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node) or ""
            if QUESTIONS.match(text):
                bad.append((getattr(node, "lineno", 1), text.splitlines()[0]))
    return bad


@pytest.mark.parametrize("path", PYTHON, ids=label)
def test_names_and_docstrings_are_plain(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [f"{label(path)}, line {line}: {word}" for line, word in wording(tree)] == []


def test_wording_is_recognised():
    source = (
        '"""What it does."""\ndef f(own, x):\n    """Sum."""\n    found = x\n    return found\n'
    )
    assert [word for _, word in wording(ast.parse(source))] == ["What it does.", "own", "found"]


DOCUMENTS = [
    REPOSITORY / name
    for name in ("CONTRIBUTING.md", "tests/README.md", "docs/tour.md", "docs/architecture.md")
] + [REPOSITORY / "docs/multinode.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=label)
def test_documents_name_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    linked = [document.parent / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    named = re.findall(r"(?:megamod|launchers|kernels|ds_configs|tests|docs)/[\w./-]*\w", text)
    missing = [path for path in linked if not path.exists()]
    missing += [
        name
        for name in named
        if not (REPOSITORY / name).exists() and "NAME" not in name and not name.endswith(".example")
    ]
    assert missing == []


def test_the_tree_in_the_documents_is_the_tree():
    output = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (megamod/[\w/.]+\.py) ", output, flags=re.MULTILINE)
    folders = tuple(re.findall(r"^    (megamod/[\w/]+/) ", output, flags=re.MULTILINE))
    trivial = {  # packages whose first file is one line of description
        label(path)
        for path in (REPOSITORY / "megamod").rglob("__init__.py")
        if len(path.read_text(encoding="utf-8").splitlines()) < 2
    }
    existing = {label(path) for path in (REPOSITORY / "megamod").rglob("*.py")} - trivial
    assert folders and all((REPOSITORY / folder).is_dir() for folder in folders)
    alone = {name for name in existing if not name.startswith(folders)}
    assert set(lines) == alone and len(lines) == len(set(lines))


def test_the_tour_names_things_that_exist():
    """In each section the words in backticks stand in the file of its heading, or are files."""
    sections = (REPOSITORY / "docs/tour.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) == 7
    for section in sections:
        path = REPOSITORY / re.match(r"\d\. `([^`]+)`", section)[1]
        source = path.read_text(encoding="utf-8")
        section = section.partition("After that the batch is gone")[0].partition("\n")[2]
        for word in re.findall(r"`([A-Za-z_][\w.]*)`", section):
            if word.endswith(".py"):
                assert (REPOSITORY / "megamod" / word).exists() or word == path.name, word
            else:
                assert re.search(rf"\b{word}\b", source), f"{label(path)} has no {word}"
