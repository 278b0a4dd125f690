import re
import resource
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import launch

from megamod.args import (
    DataArgs,
    LoraArgs,
    ModelArgs,
    OptimArgs,
    RunArgs,
    SafetyArgs,
    apply_deepspeed_values,
)
from megamod.btm.campaign import BtmArgs
from megamod.command_line import FOREIGN_FLAGS
from megamod.commands import list_verbs
from megamod.errors import UserError
from megamod.flags import (
    Arguments,
    find_origin,
    move_argument_to_flag,
    option,
    parse_args,
    require_values,
)
from megamod.run_recipe import read_run_recipe, write_run_recipe

ROOT = Path(__file__).resolve().parents[1]
CLASSES = (RunArgs, SafetyArgs, OptimArgs, ModelArgs, LoraArgs, DataArgs)
RECIPES = sorted((ROOT / "launchers" / "recipes").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for cls in CLASSES:
        for f in fields(cls):
            monkeypatch.delenv(f"MEGAMOD_{f.name.upper()}", raising=False)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse(*argv: str) -> dict[str, object]:
    parsed = parse_args(*CLASSES, argv=argv)
    return {f.name: getattr(args, f.name) for args in parsed for f in fields(args)}


def message(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(*CLASSES, argv=argv)
    return str(caught.value)


def test_later_sources_win_and_are_remembered(recipe, monkeypatch):
    path = recipe("max_steps: 1\nseed: 1\nsave_steps: 1\nlearning_rate: 1e-3\n")
    monkeypatch.setenv("MEGAMOD_SEED", "2")
    monkeypatch.setenv("MEGAMOD_SAVE_STEPS", "2")
    run, optim = parse_args(RunArgs, OptimArgs, argv=[path, "--save_steps", "3"])
    assert (run.logging_steps, run.max_steps, run.seed, run.save_steps) == (10, 1, 2, 3)
    assert optim.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert [find_origin(run, n) for n in ("logging_steps", "max_steps", "seed", "save_steps")] == [
        "default",
        f"recipe {path}",
        "environment MEGAMOD_SEED",
        "--save_steps",
    ]


def test_flags_are_read_in_every_usual_form():
    values = parse(
        "--max-steps=7", "--domains", "law", "med", "--print_groups", "--domain_token", "false",
        "--local_rank", "3", "--traceback", "--warmup_steps", "none",
        "--model_name_or_path", "350m",
    )  # fmt: skip
    assert values["max_steps"] == 7
    assert values["domains"] == ["law", "med"]
    assert values["print_groups"] is True
    assert values["domain_token"] is False
    assert values["warmup_steps"] is None
    assert values["model"] == "350m"


@pytest.mark.parametrize("rank", ["--local_rank=0", "--local-rank=1"])
def test_the_recipe_is_found_behind_the_rank_of_the_launcher(recipe, rank):
    assert parse(rank, recipe("seed: 5"), "--max_steps", "2")["seed"] == 5


@pytest.mark.parametrize(
    "argv",
    [
        ["--deepspeed", "x.json"],
        ["--deepspeed", "--deepspeed_config", "x.json"],
        ["--deepspeed_config", "x.json", "--deepspeed"],
        ["--deepspeed", "x.json", "--deepspeed_config", "./x.json"],
    ],
)
def test_spellings_of_the_deepspeed_file(argv):
    assert Path(parse(*argv)["deepspeed"]) == Path("x.json")
    assert parse("--deepspeed")["deepspeed"] is None


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--max_step", "3"], ["--max_step", "--max_steps"]),
        (["--lerning_rate=3"], ["--lerning_rate", "--learning_rate"]),
        (["--max_steps", "many"], ["--max_steps", "'many'", "a whole number, 0 or more"]),
        (["--max_steps"], ["--max_steps"]),
        (["--seed", "3", "stray"], ["'stray'", "first argument"]),
        (["--alpha", "nan"], ["--alpha", "nan", "1 or less"]),
        (["--seed", "9" * 400], ["--seed"]),
        (["--sampler", "random"], ["--sampler", "random", "balanced, unbalanced, temperature"]),
        (["--print_groups", "maybe"], ["--print_groups", "true or false"]),
        (["--spike_factor", "0.5"], ["--spike_factor", "0.5"]),
        (["--domains", "law", "law"], ["--domains", "law", "twice"]),
        (["--domains", "a/b"], ["--domains", "a/b"]),
        (["--hidden_size", "100", "--num_attention_heads", "3"], ["100", "3"]),
        (["--deepspeed", "a", "--deepspeed_config", "b"], ["--deepspeed a", "b"]),
        (["--global_batch_size", "8", "--gradient_accumulation_steps", "2"], ["8", "2"]),
        (["absent.yaml"], ["absent.yaml"]),
    ],
)
def test_one_message_names_flag_value_and_choice(argv, parts):
    text = message(*argv)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nmax_step: 3\n", ["line 2", "'max_step'", "'max_steps'"]),
        ("seed: 1\nseed: 1\n", ["line 2", "'seed'", "appears twice"]),
        ("seed: [1\n", ["line 2", "not YAML"]),
        ("seed: 1.5\n", ["line 1", "seed", "1.5", "a whole number"]),
        ("seed: true\n", ["line 1", "True"]),
        ("model: 125\n", ["line 1", "125", "quotes"]),
        ("domains: law\n", ["line 1", "'law'", "a list of names"]),
        ("seed: 2020-99-99\n", ["line 1", "seed"]),
        ("learning_rate: .inf\n", ["line 1", "inf"]),
        ("- 1\n", ["key: value"]),
        ("seed: !!python/object/apply:os.getpid []\n", ["line 1", "seed"]),
        ("\x00", ["not YAML"]),
        ("a: " + "[" * 5000, ["recipe"]),
    ],
)
def test_bad_recipes(recipe, text, parts):
    path = recipe(text)
    result = message(path)
    assert path in result
    for part in parts:
        assert part in result


def test_an_empty_recipe_changes_nothing(recipe):
    assert parse(recipe("")) == parse()


@given(st.text(alphabet="seed: 1\n-[]{}&*!|>'\"%@`#,?\t\xe9", max_size=40))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_recipe_or_a_user_error(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_text(text)
    try:
        parse(str(path))
    except UserError as error:
        assert str(path) in str(error)


@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(0, 1e9),
    folder=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    domains=st.none() | st.lists(st.from_regex(r"[\w-]{1,9}", fullmatch=True).filter(str.isascii),
                                 min_size=1, unique=True),
)  # fmt: skip
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_run_repeats_itself(tmp_path, seed, rate, folder, domains):
    given_args = (
        RunArgs(seed=seed, output_dir=folder),
        OptimArgs(learning_rate=rate),
        DataArgs(domains=domains),
    )
    write_run_recipe(tmp_path / "run.yaml", *given_args)
    again = parse_args(RunArgs, OptimArgs, DataArgs, argv=[str(tmp_path / "run.yaml")])
    assert again == given_args


@pytest.mark.parametrize("text", ["seed: [", "- 1", "", "seed: 2020-01-01", "seed: 1\nseed: 2"])
def test_a_damaged_run_yaml_is_one_sentence(tmp_path, text):
    assert read_run_recipe(tmp_path) == {}
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        read_run_recipe(tmp_path)


def test_a_saved_run_tells_origins_and_keeps_a_derived_accumulation(tmp_path):
    path = tmp_path / "run.yaml"
    write_run_recipe(path, *parse_args(RunArgs, argv=["--global_batch_size", "32"]))
    assert "global_batch_size: 32  # --global_batch_size\n" in path.read_text()
    assert "seed: 1  # default\n" in path.read_text()
    (run,) = parse_args(RunArgs, argv=[str(path)])
    assert (run.global_batch_size, run.gradient_accumulation_steps) == (32, 1)


@pytest.mark.parametrize(
    ("words", "moved"),
    [
        ("runs/a --port 1", "--port 1 --model runs/a"),
        ("--port=1 runs/a", "--port=1 --model runs/a"),
        ("recipe.yaml --model runs/a", "recipe.yaml --model runs/a"),
        ("a b --port 1", "a b --port 1"),
        ("--port 1", "--port 1"),
    ],
)
def test_a_bare_word_becomes_a_flag(words, moved):
    assert move_argument_to_flag(words.split(), "--model") == moved.split()


def test_classes_check_themselves_and_stay_small():
    with pytest.raises(UserError, match=r"--report_to: 'mlflow'"):
        RunArgs(report_to="mlflow")
    for cls in CLASSES:
        assert len(fields(cls)) <= 15
        for f in fields(cls):
            assert f.metadata["help"]


def test_require_names_what_is_missing():
    require_values(RunArgs(output_dir="out"), "output_dir")
    with pytest.raises(UserError, match="--output_dir is missing: folder of this run"):
        require_values(RunArgs(), "output_dir", "seed")


def test_the_run_follows_what_was_settled_with_deepspeed():
    run, optim = parse_args(RunArgs, OptimArgs, argv=["--learning_rate", "0.1"])
    values = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "optimizer.params.lr": 0.1,
        "optimizer.params.betas": [0.9, 0.999],
        "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": 0.0,
        "bf16.enabled": True,
        "fp16.enabled": False,
    }
    apply_deepspeed_values(run, optim, values, "DeepSpeed x.json", domains_per_rank=4)
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == (3, 2)
    assert (run.precision, optim.max_grad_norm, optim.adam_beta2) == ("bf16", 1.0, 0.999)
    assert find_origin(run, "precision") == "DeepSpeed x.json"
    assert find_origin(optim, "learning_rate") == "--learning_rate"
    assert find_origin(optim, "adam_beta1") == "default"
    with pytest.raises(UserError, match=r"x\.json: .* 8 is not a multiple of the 3 domains"):
        apply_deepspeed_values(run, optim, values, "DeepSpeed x.json", domains_per_rank=3)


def test_help_teaches(capsys):
    @dataclass
    class Extra(Arguments):
        """Extra things."""

        share: float = option(0.5, "100% is all", least=0)

    with pytest.raises(SystemExit) as caught:
        parse_args(RunArgs, Extra, argv=["-h"], doc="Do it.\n\n    python do.py --share 1\n")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("Do it.", "python do.py --share 1", "Extra things:", "100% is all (default: 0.5)"):
        assert part in text


def test_help_is_there_within_a_second():
    code = "from megamod.args import *; from megamod.flags import parse_args; "
    code += "parse_args(RunArgs, DataArgs, argv=['--help'])"
    took = []
    for _ in range(3):
        start = processor_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        took.append(processor_seconds() - start)
        assert done.returncode == 0
        assert "--max_seq_length" in done.stdout
    assert min(took) < 1


def processor_seconds() -> float:
    """Of processes that were waited for: what they take does not depend on what else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


TOKENS = {
    "quickstart": 2_048,
    "demix_125m_d8": 524_288,
    "demix_350m_d8": 1_048_576,
    "demix_750m_d8": 2_097_152,
    "demix_1.3b_d8": 2_097_152,
    "dense_125m": 524_288,
    "dense_350m": 1_048_576,
    "dense_750m": 2_097_152,
    "dense_1.3b": 2_097_152,
    "btm_125m": 1_048_576,
}
GPUS = {"125m": 32, "350m": 64, "750m": 128, "1.3b": 128}


def test_every_recipe_is_listed():
    assert {path.stem for path in RECIPES} >= set(TOKENS)


def accumulation(run: RunArgs, ranks: int) -> float:
    return run.global_batch_size / (run.per_device_train_batch_size * ranks)


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_recipe_batches_are_those_of_the_papers(name):
    path = next(p for p in RECIPES if p.stem == name and p.parent.name != "modern")
    driven = (BtmArgs,) if name.startswith("btm") else ()
    run, _, _, model, _, data, *_ = parse_args(*CLASSES, *driven, argv=[str(path)])
    assert run.global_batch_size * data.max_seq_length == TOKENS[name]
    assert f"Tokens per update: {TOKENS[name]}" in path.read_text().replace("\n#", "")
    if name == "quickstart":
        assert [accumulation(run, ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
        return
    assert run.per_device_train_batch_size == 2
    gpus, steps = (16, 32) if name.startswith("btm") else (GPUS[model.model], 8)
    assert f"GPUs: {gpus}" in path.read_text()
    assert accumulation(run, gpus) == steps
    kind = name.partition("_")[0]
    assert model.untie == {"demix": "feedforward", "dense": "none", "btm": "none"}[kind]
    assert data.domains == sorted(data.domains)
    assert len(data.domains) == 8
    known = {f.name for c in CLASSES + driven for f in fields(c)}
    assert set(yaml.safe_load(path.read_text())) <= known


def test_numbers_as_a_list(tmp_path):
    @dataclass
    class Weights(Arguments):
        """Weights."""

        weights: list[float] | None = option(None, "numbers")  # noqa: RUF009

    (tmp_path / "r.yaml").write_text("weights: [1, 2.5]")
    (recipe,) = parse_args(Weights, argv=[str(tmp_path / "r.yaml")])
    (flags,) = parse_args(Weights, argv=["--weights", "-1", "2.5e-1"])
    assert recipe.weights == [1.0, 2.5] and flags.weights == [-1.0, 0.25]
    for wrong in ("x", "inf", "nan"):
        with pytest.raises(
            UserError, match=r"--weights: .* is not allowed; give a list of numbers"
        ):
            parse_args(Weights, argv=["--weights", "1", wrong])


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--lr", "here it is --learning_rate"),
        ("--bf16", "here it is --precision bf16"),
        ("--overwrite_output_dir", "here it is --output_dir with a new folder"),
        ("--overwrite_cache", "here it is not needed, since caches are found by a digest"),
        ("--epochs=3", "here it is --max_steps"),
        ("--zzz", "unknown flag '--zzz'; --help lists all"),
        ("--lerning_rate", "the nearest is '--learning_rate'"),
    ],
)
def test_flags_of_other_programs_are_answered(flag, answer):
    assert answer in message(flag)


def test_every_answer_names_a_flag_that_a_command_has(capsys):
    flags = set()
    for verb in list_verbs():
        with pytest.raises(SystemExit):
            launch(verb.replace("-", "_"), "--help")
        flags |= set(re.findall(r"--\w+", capsys.readouterr().out))
    for foreign, answers in FOREIGN_FLAGS.items():
        named = {flag for answer in answers for flag in re.findall(r"^--\w+", answer)}
        assert named <= flags, foreign


@dataclass
class Lists(Arguments):
    """Lists."""

    weights: list[float] | None = option(None, "numbers")  # noqa: RUF009
    models: list[str] | None = option(None, "folders", separator=":")  # noqa: RUF009
    prompt: list[str] | None = option(None, "texts")  # noqa: RUF009


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("--weights", "0.1,0.9"), [0.1, 0.9]),
        (("--weights", "0.1", "0.9"), [0.1, 0.9]),
        (("--models", "a/b:c"), ["a/b", "c"]),
        (("--models", "a:b", "c"), ["a:b", "c"]),
        (("--models", "a:"), ["a:"]),
        (("--prompt", "Note: yes"), ["Note: yes"]),
    ],
)
def test_lists_in_one_word(words, values):
    (args,) = parse_args(Lists, argv=words)
    assert getattr(args, words[0][2:]) == values
