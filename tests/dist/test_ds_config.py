import json
import random
from pathlib import Path

import pytest

from megamod.dist import ds_keys
from megamod.dist.ds_config import apply_sharing_rules, resolve_ds_config
from megamod.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
VALUES = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.1,
    "optimizer.params.lr": 5e-4,
    "optimizer.params.betas": [0.9, 0.95],
    "optimizer.params.eps": 1e-7,
    "optimizer.params.weight_decay": 0.1,
    "bf16.enabled": False,
    "fp16.enabled": False,
    "zero_optimization.reduce_bucket_size": 16384,
    "zero_optimization.stage3_prefetch_bucket_size": 16384,
    "zero_optimization.stage3_param_persistence_threshold": 1280,
    "zero_optimization.offload_optimizer.nvme_path": "runs/one/offload",
}
RANKS = 4  # 64 / (8 x 2)
SHARINGS = {
    "cpu_smoke": ("dense", "demix", "btm"),
    "zero0": ("dense",),
    "zero1_bf16": ("dense", "demix", "btm"),
    "zero2_bf16": ("dense", "demix", "btm"),
    "zero2_bf16_offload": ("dense", "demix", "btm"),
    "zero2_fp16": ("dense", "demix", "btm"),
    "zero3_bf16": ("dense", "btm"),
    "zero3_bf16_nvme": ("dense", "btm"),
    "demix_zero2_bf16": ("demix",),
}


@pytest.fixture
def resolve(tmp_path):
    def call(content, origins=None, values=VALUES, **options):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return resolve_ds_config(str(path), values, origins or {}, **options)

    return call


@pytest.fixture
def refusal(resolve, tmp_path):
    def call(*args, **options) -> str:
        with pytest.raises(UserError) as caught:
            resolve(*args, **options)
        assert str(tmp_path / "ds.json") in str(caught.value)
        return str(caught.value)

    return call


def test_every_shipped_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(SHARINGS)
    table = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.json`" in table for name in SHARINGS)


@pytest.mark.parametrize(("name", "sharing"), [(n, s) for n in SHARINGS for s in SHARINGS[n]])
def test_deepspeed_accepts_shipped_files(name, sharing):
    from deepspeed.runtime.config import DeepSpeedConfig

    config, values = resolve_ds_config(str(FOLDER / f"{name}.json"), VALUES, {})
    apply_sharing_rules(config, sharing, RANKS)
    read = DeepSpeedConfig(dict(config))
    assert read.zero_optimization_stage == {"0": 0, "1": 1, "2": 2, "3": 3}.get(
        name.partition("zero")[2][:1], 1
    )
    assert read.train_micro_batch_size_per_gpu == 8
    assert read.gradient_accumulation_steps == 2
    assert read.gradient_clipping == 0.1
    assert read.bfloat16_config.enabled == values["bf16.enabled"] == ("bf16" in name)
    assert read.float16_config.enabled == values["fp16.enabled"] == name.endswith("fp16")
    assert read.use_data_before_expert_parallel_ == (sharing == "demix")
    assert read.zero_allow_untested_optimizer
    assert not read.zero_force_ds_cpu_optimizer
    assert read.optimizer_name is None


def test_without_a_file_it_is_stage_1_in_the_precision_of_the_run():
    config, values = resolve_ds_config(None, VALUES, {})
    assert config["zero_optimization"] == {"stage": 1}
    assert "bf16" not in config
    assert values["train_batch_size"] == 64
    half = {**VALUES, "bf16.enabled": True}
    config, values = resolve_ds_config(None, half, {"bf16.enabled": "--precision"})
    assert config["bf16"] == {"enabled": True}
    assert values["bf16.enabled"]


def test_the_file_wins_over_defaults(resolve):
    config, values = resolve(
        {
            "train_micro_batch_size_per_gpu": 2,
            "train_batch_size": 48,
            "gradient_clipping": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": "auto"}},
            "fp16": {"enabled": True, "initial_scale_power": "auto", "loss_scale": "auto"},
            "bf16": {"enabled": "auto"},
        }
    )
    assert values["gradient_accumulation_steps"] == 6  # 48 / (2 x 4 ranks)
    assert config["gradient_accumulation_steps"] == 6
    assert config["gradient_clipping"] == 1
    assert "optimizer" not in config
    assert "train_batch_size" not in config
    assert values["optimizer.params.lr"] == 1e-3
    assert values["optimizer.params.betas"] == [0.9, 0.95]
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 7, "loss_scale": 0}
    assert config["bf16"] == {"enabled": False}


def test_a_fixed_global_batch_decides_the_accumulation(resolve):
    origins = {"train_batch_size": "--global_batch_size"}
    _, values = resolve({"train_micro_batch_size_per_gpu": 4}, origins)
    assert (values["train_batch_size"], values["gradient_accumulation_steps"]) == (64, 4)


def test_all_conflicts_are_in_one_message(refusal):
    text = refusal(
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-7}},
        },
        {
            "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
            "gradient_clipping": "recipe r.yaml",
            "fp16.enabled": "--precision",
            "optimizer.params.lr": "environment MEGAMOD_LEARNING_RATE",
            "optimizer.params.eps": "--adam_epsilon",
        },
    )
    for pair in (
        ("train_micro_batch_size_per_gpu is 4", "8 from --per_device_train_batch_size"),
        ("gradient_clipping is 1.0", "0.1 from recipe r.yaml"),
        ("fp16.enabled is True", "False from --precision"),
        ("optimizer.params.lr is 0.001", "0.0005 from environment MEGAMOD_LEARNING_RATE"),
    ):
        assert all(part in text for part in pair)
    assert "eps" not in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimisation": {"stage": 1}}, ["zero_optimisation", "zero_optimization"]),
        ({"zero_optimization": {"stag": 1}}, ["zero_optimization.stag", "optimization.stage"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", "4"]),
        ({"zero_optimization": {"stage": "2"}}, ["zero_optimization.stage", "'2'"]),
        ({"zero_optimization": True}, ["zero_optimization", "block"]),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, ["reduce_bucket_size", "greater than"]),
        ({"zero_optimization": {"reduce_bucket_size": 10**40}}, ["no size or interval can be"]),
        ({"train_micro_batch_size_per_gpu": 10**40}, ["no size or interval can be"]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled", "'yes'"]),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, ["check_grad_overflow"]),
        ({"gradient_clipping": -1}, ["gradient_clipping", "-1"]),
        ('{"gradient_clipping": 1e999}', ["gradient_clipping", "inf"]),
        ({"train_batch_size": 0}, ["train_batch_size", "0"]),
        ({"train_batch_size": 63}, ["63", "multiple of 8 sequences", "4 ranks"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"optimizer": {"params": {"betas": [0.9, 1.0]}}}, ["betas"]),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, ["optimizer.params.max_grad_norm"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "--lr_scheduler_type"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, ["ratio is 0.5"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "stage 3"]),
        ({"fp16": {"loss_scale_window": "auto"}}, ["auto", "fp16.loss_scale_window"]),
        ({"elasticity": {"enabled": True}}, ["elasticity", "--resume"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["mics_shard_size", "remove it"]),
        ('{"fp16": {}, "fp16": {}}', ["'fp16'", "twice"]),
        ('{\n "fp16": {,}\n}', ["line 2, column 11"]),
        ('{"gradient_clipping": NaN}', ["NaN"]),
        ("[]", ["list"]),
        ("\x00", ["line 1"]),
        ("[" * 100_000, ["JSON"]),
    ],
)
def test_mistakes_are_named(refusal, content, parts):
    text = refusal(content)
    for part in parts:
        assert part in text


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match="cannot be read"):
            resolve_ds_config(str(path), VALUES, {})
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.json is not JSON"):
        resolve_ds_config(str(tmp_path / "latin.json"), VALUES, {})
    huge = {"zero_optimization": {"reduce_bucket_size": 10**30}}
    (tmp_path / "huge.json").write_text(json.dumps(huge))
    with pytest.raises(UserError, match=r"reduce_bucket_size is 1000\d+"):
        resolve_ds_config(str(tmp_path / "huge.json"), VALUES, {})


def test_switched_off_blocks_and_nulls_pass(resolve):
    config, _ = resolve(
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
            "autotuning": {"enabled": False},
            "scheduler": None,
            "bf16": None,
            "data_types": {"keep_in_fp32_modules": "auto"},
        }
    )
    assert config["zero_optimization"]["stage"] == 2
    assert "bf16" not in config
    assert config["data_types"] == {"keep_in_fp32_modules": "auto"}


def test_unknown_keys_pass_on_request(resolve):
    config, _ = resolve({"from_the_future": {"x": 1}}, allow_unknown=True)
    assert config["from_the_future"] == {"x": 1}


@pytest.mark.parametrize(
    ("config", "sharing", "advice"),
    [
        ({"zero_optimization": {"stage": 0}}, "demix", "use stage 1 or 2"),
        ({"zero_optimization": {"stage": 3}}, "demix", "use stage 1 or 2"),
        ({"zero_optimization": {"stage": 0}}, "btm", "use stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "dense", "use stage 1"),
        ({"zero_optimization": {"stage": 0}, "fp16": {"enabled": True}}, "dense", "use stage 1"),
        (
            {
                "zero_optimization": {"stage": 2},
                "bf16": {"enabled": True},
                "fp16": {"enabled": True},
            },
            "dense",
            "enable one of them",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
            "demix",
            "reduce_scatter true",
        ),
        (
            {"zero_optimization": {"stage": 2, "contiguous_gradients": False}},
            "demix",
            "contiguous_gradients true",
        ),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "dense",
            "use stage 2",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "dense",
            "needs ZeRO stage 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "dense",
            "use stage 3, or device cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "dense",
            "nvme_path is missing",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "dense",
            "offload_param needs ZeRO stage 3",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "dense",
            "use cpu, or remove",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
            "dense",
            "does not divide the 4 ranks",
        ),
    ],
)
def test_combinations_that_are_refused(config, sharing, advice):
    with pytest.raises(UserError, match=advice):
        apply_sharing_rules(config, sharing, RANKS)


@pytest.mark.parametrize("sharing", ["dense", "demix", "btm"])
@pytest.mark.parametrize("half", [None, "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_combination_works_or_is_refused(stage, half, sharing):
    config = {"zero_optimization": {"stage": stage}}
    if half:
        config[half] = {"enabled": True}
    allowed = {"dense": {0, 1, 2, 3}, "demix": {1, 2}, "btm": {1, 2, 3}}[sharing]
    if stage in allowed and (stage or not half):
        apply_sharing_rules(config, sharing, RANKS)
        assert config.get("use_data_before_expert_parallelism", False) == (sharing == "demix")
    else:
        with pytest.raises(UserError):
            apply_sharing_rules(config, sharing, RANKS)


def test_our_table_of_keys_is_that_of_the_installed_deepspeed():
    from deepspeed.runtime import config as deepspeed_config

    read = set()

    class Spy(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

        def __contains__(self, key):
            read.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

    deepspeed_config.DeepSpeedConfig(Spy(train_batch_size=1))
    ours = set(ds_keys.build_key_tree())
    removed = {key for key in ds_keys.REMOVED if "." not in key}
    assert ours | removed == read | {"sequence_parallel_size"}  # read where an mpu is absent
    theirs = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert removed == theirs | {"bfloat16"}  # an old name that DeepSpeed still reads
    assert {key.partition(".")[2] for key in ds_keys.REMOVED if "." in key} == set(
        deepspeed_config._REMOVED_ZERO_CONFIG_KEYS
    )


def test_every_path_in_the_tables_is_a_known_key():
    tree = ds_keys.build_key_tree()
    for path in [*ds_keys.REFUSED, *ds_keys.REQUIRED, *ds_keys.OPTIONAL_AUTO]:
        block = tree
        for part in path.split("."):
            assert part in block, path
            block = block[part]


def test_damaged_files_are_user_errors(tmp_path):
    whole = (FOLDER / "demix_zero2_bf16.json").read_bytes()
    dice = random.Random(0)
    path = tmp_path / "ds.json"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(damaged))
            choice = dice.random()
            if choice < 0.4:
                damaged[at] = dice.randrange(256)
            elif choice < 0.7:
                del damaged[at : at + dice.randint(1, 30)]
            else:
                damaged[at:at] = dice.choice([b"{", b"null", b'"auto"', b"-", b"1e9", b"[1]", b","])
        path.write_bytes(damaged)
        try:
            config, _ = resolve_ds_config(str(path), VALUES, {})
            apply_sharing_rules(config, "demix", RANKS)
        except UserError as error:
            assert len(str(error)) < 1000
