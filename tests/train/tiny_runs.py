"""A tiny model trained on made-up ragged batches, by the real loop and by a plain reference."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import deepspeed
import torch
from models.tiny_hosts import tiny_stock
from safetensors import safe_open
from torch import nn

from megamod.dist.process import get_rank as my_rank
from megamod.dist.process import get_world_size
from megamod.dist.scope import Sharing, parse_sharing
from megamod.dist.topology import DomainTopology
from megamod.models.lm.configuration import DemixConfig, LmConfig
from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
from megamod.models.lm.host import make_dense_class, make_host_classes
from megamod.runs.pretrain.causal_lm import make_lm_card
from megamod.states.checkpoint_folder import TrainState
from megamod.train.checkpoint import Checkpoints
from megamod.train.deepspeed_settings import apply_muon_rules
from megamod.train.engine import build_engine
from megamod.train.export import ModelExport
from megamod.train.loop import LoopPlan, train
from megamod.train.monitor import Monitor
from megamod.train.muon import make_muon
from megamod.train.objectives import CausalLMObjective
from megamod.train.optim import make_adamw, make_linear_schedule, set_learning_rate

DOMAINS = ("law", "med", "code", "news")
VOCAB, LENGTH, MICRO = 40, 12, 2
# With a usual eps Adam turns rounding noise of gradients that are zero in exact arithmetic (the key
# bias) into updates of full size; with this one the update is smooth in the gradient.
RECIPE = dict(betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1)
PEAK, WARMUP = 3e-3, 2
MUON_SCALE = 4.0  # learning rate of Muon as a multiple of AdamW's
NOTHING: Mapping[str, object] = MappingProxyType({})


def tiny_config(untie: str, domains=DOMAINS, dropout: float = 0.0, width: int = 16) -> DemixConfig:
    return DemixConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        domains=list(domains),
        untie="none" if untie == "all" else untie,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def model_of(
    untie: str, domains=DOMAINS, held=None, dropout: float = 0.0, width: int = 16, family=None
) -> tuple[LmConfig, nn.Module]:
    """Configuration and new weights: of our decoder, or of a family of transformers."""
    if family is None:
        config = tiny_config(untie, domains, dropout, width)
        model = DemixForCausalLM(config, held)
        initialise_lm_weights(model, seed=5)
        return config, model
    stock = tiny_stock(family, seed=5)
    if untie in ("none", "all"):
        model = make_dense_class(type(stock))(stock.config)
        model.load_state_dict(stock.state_dict())
        return stock.config, model
    kind, model_class = make_host_classes(family)
    fields = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    config = kind(**fields, domains=list(domains), untie=untie)
    model = model_class(config, ())
    model.load_state_dict(stock.state_dict())
    model.untie_feed_forwards(domains if held is None else held)
    return config, model


def make_batch(domain: str, step: int, index: int, ragged: bool = True) -> dict[str, object]:
    """Micro-batch `index` of a domain in a step; some rows are padded on the right."""
    seed = DOMAINS.index(domain) * 10_000 + step * 100 + index
    generator = torch.Generator().manual_seed(seed)
    low = 2 + 9 * DOMAINS.index(domain)  # domains use different words
    tokens = torch.randint(low, low + 10, (MICRO, LENGTH + 1), generator=generator)
    ids, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    number = DOMAINS.index(domain)
    batch = {"domain": number, "domains": torch.full((MICRO,), number)}
    if ragged:
        length = int(torch.randint(3, LENGTH + 1, (), generator=generator))
        ids[-1, length:], labels[-1, length:] = 1, -100
        batch["attention_mask"] = ids != 1
    return {
        **batch,
        "input_ids": ids,
        "labels": labels,
        "tokens": int((labels != -100).sum()),
    }


def batches_of(topology: DomainTopology, per_domain: int):
    """This rank's micro-batches from a step on; `per_domain` micro-batches per domain and step.

    In dense training rank r takes every W-th of all micro-batches of the step.
    """
    rank = my_rank()

    def batches_from(step: int):
        while True:
            if topology.sharing is Sharing.DENSE:
                everything = [(d, i) for d in topology.domains for i in range(per_domain)]
                mine = everything[rank :: topology.world_size]
            else:
                part, parts = topology.get_rank_in_group(rank), topology.ranks_per_domain
                held = topology.get_rank_domains(rank)
                mine = [(d, i) for i in range(part, per_domain, parts) for d in held]
            for domain, index in mine:
                yield make_batch(domain, step, index)
            step += 1

    return batches_from


def reference(
    untie: str,
    steps: int,
    per_domain: int,
    clip: float,
    domains=DOMAINS,
    family: str | None = None,
    decay_vectors: bool = True,
):
    """The joint objective in one process without DeepSpeed.

    Returns:
        weights by name after the last step, and the gradient norm of every step. For independent
        models ("all") a dict by domain of such pairs, each trained on its domain alone.
    """
    if untie == "all":
        return {
            d: _reference(model_of("none", domains, family=family), (d,), steps, per_domain, clip)
            for d in domains
        }
    start = model_of(untie, domains, family=family)
    return _reference(start, domains, steps, per_domain, clip, decay_vectors)


def _reference(config_and_model, domains, steps, per_domain, clip, decay_vectors=True):
    config, model = config_and_model
    model.train()
    apart = getattr(config, "untie", "none") != "none"
    vectors = [p for p in model.parameters() if p.dim() < 2 and not decay_vectors]
    rest = [p for p in model.parameters() if not any(p is vector for vector in vectors)]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": rest}]
    optimizer = make_adamw([group for group in groups if group["params"]], **RECIPE)
    schedule, norms = make_linear_schedule(PEAK, WARMUP, 10), []
    for step in range(steps):
        batches = [make_batch(d, step, i) for d in domains for i in range(per_domain)]
        items = sum(batch["tokens"] for batch in batches)
        for batch in batches:
            model(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                shift_labels=batch["labels"],
                num_items_in_batch=items,
                domain=DOMAINS[batch["domain"]] if apart else None,
            ).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        set_learning_rate(optimizer, schedule(step))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def ds_config(
    stage: int,
    micro_steps: int,
    clip: float,
    precision: str = "fp32",
    offload: Mapping[str, object] = NOTHING,
) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": stage,
            **offload,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "use_data_before_expert_parallelism": True,
        "steps_per_print": None,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 7, "hysteresis": 1}
    return config


def masters(checkpoint: Path, kind: str = "master") -> dict[str, torch.Tensor]:
    """Flat tensors put together from what all ranks wrote: "master", or a moment by its name."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in checkpoint.glob("optimizer-*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            held = set(tensors.keys())
            for name, start in tensors.metadata().items():
                if f"{kind}/{name}" in held:
                    piece = tensors.get_tensor(f"{kind}/{name}")
                    pieces.setdefault(name, {})[int(start)] = piece
    return {
        name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()
    }


def muon_of_recipe(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Muon and AdamW with the settings of `RECIPE`."""
    moments = {name: value for name, value in RECIPE.items() if name != "weight_decay"}
    return make_muon(groups, MUON_SCALE, RECIPE["weight_decay"], moments)


class Tiny(NamedTuple):
    """Build the parts of a run before it starts."""

    engine: deepspeed.DeepSpeedEngine
    topology: DomainTopology
    checkpoints: Checkpoints
    micro_steps: int


def build_tiny(
    folder: Path,
    untie: str,
    stage: int,
    *,
    per_domain: int = 2,
    clip: float = 0.5,
    precision: str = "fp32",
    offload: Mapping[str, object] = NOTHING,
    width: int = 16,
    domains=DOMAINS,
    dropout: float = 0.0,
    family: str | None = None,
    decay_vectors: bool = True,
    settings: dict | None = None,
    keep: int | None = None,
    prepare=lambda model: None,
    muon: bool = False,
) -> Tiny:
    """An engine around new weights, and its checkpoints in FOLDER/checkpoints; collective.

    Args:
        family: of transformers; None for our decoder.
        prepare: called with the model before an engine is made of it.
        muon: Muon for hidden matrices; then without clipping.
    """
    sharing = parse_sharing(untie)
    topology = DomainTopology(get_world_size(), tuple(domains), sharing)
    held = topology.get_rank_domains(my_rank())
    config, model = model_of(
        untie, domains, held if sharing is Sharing.DEMIX else None, dropout, width, family
    )
    prepare(model)
    micro_steps = per_domain * len(domains) // get_world_size()
    config_of_engine = ds_config(stage, micro_steps, clip, precision, offload)
    if muon:
        config_of_engine["gradient_clipping"] = 0.0
        apply_muon_rules(config_of_engine)
    engine = build_engine(
        model,
        muon_of_recipe if muon else lambda groups: make_adamw(groups, **RECIPE),
        config_of_engine,
        topology,
        decay_vectors=decay_vectors,
        muon=muon,
    )
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "run.yaml"
    if my_rank() == 0:
        run_file.write_text("seed: 5\n")
    torch.distributed.barrier()
    checkpoints = Checkpoints(
        folder / "checkpoints",
        engine,
        topology,
        ModelExport(
            engine, config, topology, None, run_file, make_lm_card(config, sharing, "none")
        ),
        settings or {"untie": untie},
        keep,
    )
    return Tiny(engine, topology, checkpoints, micro_steps)


def run_tiny(
    folder: Path,
    untie: str,
    stage: int,
    max_steps: int,
    *,
    per_domain: int = 2,
    clip: float = 0.5,
    save_steps: int = 0,
    resume: str = "auto",
    nonfinite: str = "stop",
    max_nonfinite_steps: int = 10,
    spike_factor: float = 0.0,
    save_failure: str = "continue",
    batches=None,
    wrap_objective=lambda objective: objective,
    eval_steps: int = 0,
    evaluate=lambda step: None,
    **build,
):
    """Train with the real loop up to `max_steps` of a schedule of 10 steps.

    Args:
        batches: from a topology to the iterator of micro-batches from a step on.
        wrap_objective: puts something around the objective, to make it fail.
        evaluate: called every `eval_steps` steps with the number of finished steps.
        build: further arguments of `build_tiny`.
    Returns:
        (engine, state, topology).
    """
    engine, topology, checkpoints, micro_steps = build_tiny(
        folder, untie, stage, per_domain=per_domain, clip=clip, **build
    )
    state = checkpoints.resume(resume) or TrainState()
    plan = LoopPlan(
        max_steps=10,
        stop_step=max_steps,
        micro_steps=micro_steps,
        schedule=make_linear_schedule(PEAK, WARMUP, 10),
        max_grad_norm=clip,
        logging_steps=2,
        eval_steps=eval_steps,
        save_steps=save_steps,
        seed=5,
        nonfinite=nonfinite,
        max_nonfinite_steps=max_nonfinite_steps,
        spike_factor=spike_factor,
        save_failure=save_failure,
    )
    monitor = Monitor(folder, topology.domains, "tokens", 10, None, None, "none", state.step)
    choose = topology.sharing is Sharing.DEMIX
    state = train(
        engine,
        wrap_objective(CausalLMObjective(topology.domains, torch.device("cpu"), choose)),
        batches(topology) if batches else batches_of(topology, per_domain),
        plan,
        state,
        checkpoints,
        monitor,
        evaluate,
    )
    monitor.close()
    return engine, state, topology
