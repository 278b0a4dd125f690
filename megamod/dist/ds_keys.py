"""Keys of a DeepSpeed JSON: known, removed from DeepSpeed, and refused here.

DeepSpeed ignores unknown top-level keys, so a misspelt block would have no effect. The names of
top-level keys are listed below; those inside a block come from DeepSpeed's pydantic models.
"""

from collections.abc import Iterator

from pydantic import BaseModel

ANY = "any"  # a block with any keys

# Top-level keys with a single value, and its type.
SCALARS = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "managed_gradient_accumulation": bool,
    "steps_per_print": int,
    "gradient_clipping": float,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "gradient_allreduce_op": str,
    "communication_data_type": str,
    "seq_parallel_communication_data_type": str,
    "sequence_parallel_size": int,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dataloader_drop_last": bool,
    "log_level": str,
    "vocabulary_size": int,
    "use_data_before_expert_parallelism": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}

# Blocks for which DeepSpeed has no pydantic model: see `build_key_tree`.
BLOCKS: dict[str, object] = {
    "optimizer": {
        "type": None,
        "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay", "torch_adam")),
        "legacy_fusion": None,
    },
    "scheduler": ANY,
    "activation_checkpointing": dict.fromkeys(
        (
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
            "cpu_checkpointing",
        )
    ),
    "aio": dict.fromkeys(
        (
            "block_size",
            "queue_depth",
            "intra_op_parallelism",
            "single_submit",
            "overlap_events",
            "use_gds",
        )
    ),
    "autotuning": ANY,
    "checkpoint": {
        "tag_validation": None,
        "load_universal": None,
        "use_node_local_storage": None,
        "checkpoint_serialization": None,
        "parallel_write": {"pipeline_stage": None},
        "writer": ANY,
    },
    "data_efficiency": ANY,
    "data_types": dict.fromkeys(
        ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")
    ),
    "datastates_ckpt": ANY,
    "expert_parallel": dict.fromkeys(("enabled", "autoep_size", "use_grouped_mm")),
    "flops_profiler": dict.fromkeys(
        (
            "enabled",
            "recompute_fwd_factor",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
        )
    ),
    "pipeline": ANY,
    "tensor_parallel": ANY,
    "torch_autocast": dict.fromkeys(("enabled", "dtype", "lower_precision_safe_modules")),
    "weight_quantization": ANY,
}

REMOVED = {
    "amp": "use bf16 or fp16",
    "bfloat16": "its name is bf16",
    "compression_training": "remove it; compress the trained model with another tool",
    "curriculum_learning": "remove it; the order of data is decided by --sampler and --seed",
    "eigenvalue": "remove it; it served quantized training only",
    "elasticity": "remove it; a run is resumed at another world size by --resume",
    "graph_harvesting": "remove it",
    "nebula": "remove it; checkpoints are written by the run, see --save_steps",
    "progressive_layer_drop": "remove it; all layers take part in every step",
    "quantize_training": "remove it; use bf16 for cheaper training",
    "sparse_attention": "remove it; attention is chosen by --attn_implementation",
    "sparse_gradients": "remove it; embedding gradients are dense",
    "zero_optimization.mics_hierarchical_params_gather": "remove it; use ZeRO stage 2 or 3",
    "zero_optimization.mics_shard_size": "remove it; use ZeRO stage 2 or 3",
    "zero_optimization.zeropp_loco_param": "remove it; zero_quantized_gradients works without",
}
"""Keys of older versions of DeepSpeed, each with advice."""

_OFFLOAD = "use zero_optimization.offload_optimizer, as in ds_configs/zero2_bf16_offload.json"
_PARALLEL = "models are split over data-parallel ranks only; remove it and use ZeRO stage 3"
_MASTERS = "checkpoints hold float32 master weights; remove it"
_FINITE = "it keeps gradients that are not finite out of the weights; remove the key"

REFUSED = {
    "autotuning": "the run decides batch sizes; remove it",
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "checkpoint.load_universal": "the run reads its own checkpoints, see --resume; remove it",
    "data_efficiency": "the order of data is decided by --sampler and --seed; remove it",
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "hybrid_engine": "it serves training by reinforcement only; remove it",
    "pipeline": _PARALLEL,
    "scheduler": "the learning rate follows --lr_scheduler_type and --warmup_ratio; remove it",
    "sequence_parallel_size": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "torch_autocast": "use bf16 or fp16",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.legacy_stage1": "DeepSpeed has no such stage any more; remove it",
    "zero_optimization.offload_optimizer.super_offload": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
}
"""Keys that are allowed only if switched off, each with an alternative."""

REQUIRED = {
    "bf16.check_grad_overflow": (True, _FINITE),
    "gradient_allreduce_op": ("mean", "the loss is a mean over all ranks; remove the key"),
    "managed_gradient_accumulation": (True, "the run counts micro-batches; remove the key"),
    "zero_optimization.compute_grad_norm": (True, _FINITE),
    "zero_optimization.offload_optimizer.ratio": (1.0, "all is offloaded, or nothing"),
}
"""Keys with a single allowed value, and the reason."""

OPTIONAL_AUTO = {"data_types.keep_in_fp32_modules"}
"""Keys of which DeepSpeed itself accepts "auto"."""


def load_block_models() -> dict[str, type[BaseModel]]:
    """Import DeepSpeed, and return its pydantic model of each block that has one, by key path."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": monitor.TensorBoardConfig,
        "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig,
        "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def build_key_tree() -> dict[str, object]:
    """Build a tree of all known keys.

    A key is mapped to None for a value, to a dictionary of keys for a block, or to `ANY` for either
    of them with any content.
    """
    tree: dict[str, object] = dict.fromkeys(SCALARS) | BLOCKS | {"timers": {}}
    for path, model in load_block_models().items():
        *parents, name = path.split(".")
        block = tree
        for parent in parents:
            block = block[parent]
        block[name] = _build_model_tree(model)
    return tree


def _build_model_tree(model: type[BaseModel]) -> dict[str, object]:
    """Build the tree of a pydantic model's fields, under their names and their aliases."""
    keys: dict[str, object] = {}
    for name, info in model.model_fields.items():
        inner = next(_iterate_models(info.annotation), None)
        for spelling in {name, info.alias or name}:
            keys[spelling] = _build_model_tree(inner) if inner else None
    return keys


def _iterate_models(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _iterate_models(part)
