"""Commands, YAML and Python of README.md and docs/ are accepted by the programs that they name."""

import ast
import importlib.util
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import yaml
from launch import launch
from ranks import on_ranks
from runs.test_host_pretrain import seed_folder, words_of

from megamod.command_line import CommandParser
from megamod.commands import list_verbs
from megamod.errors import UserError
from megamod.merging.recipe_file import read_recipe
from megamod.runs.studies.barrier_recipe import read_barrier_study

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")),
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / name / "README.md" for name in ("ds_configs", "launchers/recipes")),
    ]
)
FOLDERS = r"(?:launchers|ds_configs|tests|kernels|megamod|docs)/[\w./-]*\w"


@dataclass(frozen=True)
class Block:
    """A code block: fenced, with its language, or indented by four blanks."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Code blocks of a page, in order."""
    blocks: list[Block] = []
    fence, lines, first = None, [], 0
    content = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate([*content, ""], start=1):
        mark = re.match(r"```(\w*)", line)
        if fence is not None:
            if mark:
                blocks.append(Block(page, first, fence, "\n".join(lines)))
                fence, lines = None, []
            else:
                lines.append(line)
            continue
        indented = line.startswith("    ") and (lines or not content[number - 2].strip())
        if indented or (lines and not line.strip() and number <= len(content)):
            first = first if lines else number
            lines.append(line[4:])
            continue
        if lines:
            blocks.append(Block(page, first, "", "\n".join(lines)))
            lines = []
        if mark:
            fence, first = mark[1], number + 1
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


@dataclass(frozen=True)
class Command:
    """A command, without what starts it (megamod; python, deepspeed, torchrun and a launcher).

    Attributes:
        launcher: file name of the command's module.
    """

    block: Block
    launcher: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block.page.name}:{self.block.line}:{self.launcher}"


ASSIGNMENT = re.compile(r'^ *(?:export )?(\w+)="([^"]*)"$', re.M)


def _spell_as_launcher(match: re.Match) -> str:
    """`megamod VERB` as the path of the launcher of that name."""
    return f"launchers/{match[1].replace('-', '_')}.py"


def read_commands(block: Block) -> list[Command]:
    """Commands of launchers in a block of shell commands; variables of its page are replaced."""
    page, text = block.page.read_text(encoding="utf-8"), block.text
    page, text = (shell.replace("\\\n", " ") for shell in (page, text))
    commands, text = [], ASSIGNMENT.sub("", text)
    for name, value in ASSIGNMENT.findall(page):
        text = text.replace(f"${name}", " ".join(value.split()))
    for name, value in re.findall(r"\bfor (\w+) in (\S+)[^;]*; do", text):
        text = text.replace(f"${name}", value)
    for line in text.splitlines():
        line = re.sub(r"(?<![\w/\[-])megamod ([a-z][a-z-]+)(?= |$)", _spell_as_launcher, line)
        if not re.search(r"launchers/\w+\.py", line):
            continue
        line = re.sub(r"(?:;| \||>).*", "", re.sub(r"^.*\bdo ", "", line))  # loops and pipes
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        names = [word for word in words if re.fullmatch(r"launchers/\w+\.py", word)]
        if names:
            position = words.index(names[0])
            commands.append(Command(block, Path(names[0]).stem, tuple(words[position + 1 :])))
    return commands


ORIGINALS = REPOSITORY / "docs" / "coming-from.md"


def read_table(page: Path) -> list[tuple[str, Block]]:
    """Section, and commands of the right column as a block, for each row of a page's tables."""
    section, rows = "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        section = line[3:] if line.startswith("## ") else section
        if line.startswith("| ") and not line.endswith("| here |"):
            spans = re.findall(r"`([^`]+)`", line.split(" | ")[-1])
            rows.append((section, Block(page, number, "", "\n".join(spans))))
    return rows


ORIGINAL_ROWS = read_table(ORIGINALS)
COMMANDS = [
    command
    for block in [*BLOCKS, *(block for _, block in ORIGINAL_ROWS)]
    if block.language in ("", "bash")
    for command in read_commands(block)
]


def load_launcher(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"megamod.commands.{name}")


class ParsedError(Exception):
    """Ends a launcher after it has parsed its command line."""


def enter_folder(folder: Path) -> None:
    """Change to a folder that has the repository's recipes and an empty folder of runs."""
    for name in ("launchers", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "runs").mkdir()
    os.chdir(folder)


@pytest.fixture
def launchers(monkeypatch, tmp_path):
    """Function that lets a launcher parse words, and stops it there."""
    monkeypatch.chdir(REPOSITORY)  # restores the current folder at the end
    enter_folder(tmp_path)

    def parse(launcher: str, words: tuple[str, ...]) -> None:
        module = load_launcher(launcher)
        # Commands of dataclasses call `parse_args`, which checks values; others have a parser.
        owner = module if hasattr(module, "parse_args") else CommandParser
        accept = owner.parse_args

        def accept_and_stop(*arguments, **options):
            accept(*arguments, **options)
            raise ParsedError

        monkeypatch.setattr(owner, "parse_args", accept_and_stop)
        monkeypatch.setattr(sys, "argv", [launcher, *words])
        with pytest.raises(ParsedError):
            module.main()

    return parse


def check_words(command: Command) -> list[str]:
    """Words to parse: a recipe of the reader's own, which does not exist, is dropped.

    Files that are named below a folder of the repository must exist.
    """
    words = list(command.words)
    for word in words:
        if re.fullmatch(FOLDERS, word) and not word.startswith("docs/"):
            assert (REPOSITORY / word).exists(), f"{command.block}: there is no {word}"
    placeholder = words and words[0].endswith(".yaml") and not (REPOSITORY / words[0]).exists()
    return words[1:] if placeholder and command.launcher in ("pretrain", "btm", "plan") else words


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_parsed_by_their_launcher(launchers, command):
    launchers(command.launcher, tuple(check_words(command)))


def test_flags_of_the_originals_have_a_command(capsys):
    """Every flag of a row belongs to a command that its section names."""
    for section in {section for section, _ in ORIGINAL_ROWS}:
        blocks = [block for name, block in ORIGINAL_ROWS if name == section]
        for verb in {command.launcher for block in blocks for command in read_commands(block)}:
            with pytest.raises(SystemExit):
                launch(verb, "--help")
        known = {*re.findall(r"--\w+", capsys.readouterr().out), "--num_gpus", "--master_port"}
        for block in blocks:
            assert set(re.findall(r"--\w+", block.text)) <= known, block


NAME = re.compile(
    r"(?<![\w-])(--[a-z][\w-]*)|(\w+\.(?:sh|py))\b|\b([A-Z][A-Z_]{2,})=|\$\{?([A-Z_]{2,})"
)


@pytest.mark.parametrize("name", ["btm", "ca_mtl", "demix", "merging", "mux_plm"])
def test_nothing_of_the_original_readmes_is_missing(name):
    path = REPOSITORY.parent / "shared" / "originals" / f"{name}.md"
    if not path.is_file():
        pytest.skip("the READMEs of the original programs are not here")
    words = {word for words in NAME.findall(path.read_text()) for word in words if word}
    text = ORIGINALS.read_text(encoding="utf-8")
    left = " ".join(line.rpartition(" | ")[0] for line in text.splitlines())
    assert len(words) > 8 and {word for word in words if word not in left} == set()


def test_a_wrong_flag_or_value_is_noticed(launchers):
    with pytest.raises(UserError, match="unknown flag '--untied'"):
        launchers("pretrain", ("--untied", "none"))
    with pytest.raises(UserError, match="--untie: 'half' is not allowed"):
        launchers("pretrain", ("--untie", "half"))
    with pytest.raises(UserError, match="unexpected argument 'b'"):
        launchers("verify", ("a", "b"))


def test_every_command_is_documented():
    verbs = {verb.replace("-", "_") for verb in list_verbs()}
    assert {command.launcher for command in COMMANDS} == verbs
    assert len(COMMANDS) > 90 and len(BLOCKS) > 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_and_targets_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), link
    for block in read_blocks(page):
        for name in re.findall(rf"(?<![\w/.]){FOLDERS}\.(?:py|md|json|yaml)\b", block.text):
            assert (REPOSITORY / name).exists(), f"{block}: {name}"
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M):
        assert f"\n{target}:" in makefile, target


PYTHON = [block for block in BLOCKS if block.language == "python" or "\nimport " in block.text]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_its_imports_work(block):
    for node in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_one_process_are_verbs(page):
    """`megamod VERB` starts one process; deepspeed and torchrun start files of launchers/."""
    assert not re.search(r"python (?:-m )?launchers/", page.read_text(encoding="utf-8"))


YAML = [block for block in BLOCKS if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_read(block, tmp_path):
    path = tmp_path / "document.yaml"
    path.write_text(block.text)
    content = yaml.safe_load(block.text)
    if "merge_method" in content:
        read_recipe(path)
    elif "variants" in content:
        read_barrier_study(path)


DOMAINS = ("python_code", "c_headers", "reference_prose", "package_texts")
# Jobs of their own, models that these jobs train, and a server, which does not end.
SKIPPED = ("btm", "eval_barrier", "serve")


def run_story(_: int, folder: Path, commands: list[Command]) -> None:
    """Run commands in a folder; the built-in text is short."""
    texts = {domain: words_of(domain, 100) for domain in DOMAINS}
    enter_folder(folder)
    (folder / "runs" / "docs.txt").write_text("\n\n".join(words_of("docs", 100)))
    with mock.patch("megamod.data.corpus.builtin.load_builtin_documents", lambda: texts):
        for command in commands:
            with mock.patch("sys.argv", [command.launcher, *command.words]):
                load_launcher(command.launcher).main()


@pytest.mark.slow  # the whole story of README.md: nine commands, two of them training runs
def test_the_story_of_the_readme(tmp_path, monkeypatch):
    story = next(block for block in BLOCKS if "SEED=" in block.text)
    texts = [text for domain in DOMAINS for text in words_of(domain)]
    seed = seed_folder(tmp_path / "seed", "llama", texts)
    commands = [
        replace(command, words=tuple(str(seed) if word == "$SEED" else word for word in words))
        for command in read_commands(story)
        if command.launcher not in SKIPPED and "runs/btm" not in (words := command.words)
    ]
    assert len(commands) == 13
    for name, value in {"max_steps": 2, "max_seq_length": 16, "global_batch_size": 16}.items():
        monkeypatch.setenv(f"MEGAMOD_{name.upper()}", str(value))
    on_ranks(1, run_story, tmp_path, commands)
    for name in ("demix/model", "python_code", "average", "docs/model"):
        assert (tmp_path / "runs" / name / "config.json").is_file(), name
    assert "docs" in (tmp_path / "runs/docs/model/config.json").read_text()


def test_the_page_of_messages_has_the_text_of_every_mistake():
    path = REPOSITORY / ".ci" / "message_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = "raise UserError(f'--lr {rate}: ' + name + f' is not {least!r}')"
    assert list(module.iterate_messages(source)) == ["--lr …: … is not …"]
    page = module.format_messages(REPOSITORY / "megamod")
    assert "is not a data-bin; megamod preprocess writes one`" in page
    guides = set(re.findall(r"\(\[guide\]\((\S+)\)\)", page))
    assert len(guides) >= 8 and all((REPOSITORY / "docs" / guide).is_file() for guide in guides)
