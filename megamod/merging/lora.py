"""LoRA adapters: a view of a base model with an adapter merged in.

The folder of an adapter is that of peft: `adapter_config.json` and `adapter_model.safetensors`.
Source: Hu et al. 2021 (LoRA), section 4.1; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.tensors import TensorSource, TensorView, describe_source
from megamod.states.adapter import is_adapter, read_adapter_config, resolve_seed_folder
from megamod.states.stream import ModelFolder, TensorSpec
from megamod.states.weight_files import ADAPTER_CONFIG, ADAPTER_FILE

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
"""Before the name of every module of the model."""
# Keys of adapter_config.json that are handled here or have no effect after training. Any other key
# with a non-empty value is refused.
_HANDLED = {
    *("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("r", "rank_pattern", "bias", "lora_bias", "modules_to_save", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"),
    *("peft_version", "megatron_core", "eva_config", "qalora_group_size", "ensure_weight_tying"),
    *("runtime_config",),
}
# Initialisations that leave the base model unchanged. Others change its weights.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _WeightUpdate:
    """The update of one tensor: scale * up @ down, or its transpose.

    Attributes:
        down: [rank, in]; `up`: [out, rank], both float32.
        transposed: the tensor is [in, out], as in GPT-2 and in embeddings.
        magnitude: [out], norm of each row with DoRA; None without.
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None = None

    def compute_rows(self, first: int, last: int) -> Tensor:
        """Compute rows `first` to `last` - 1 of the update, [last - first, columns] float32."""
        if self.transposed:
            return (self.up @ self.down[:, first:last]).T * self.scale
        return self.up[first:last] @ self.down * self.scale


class AdaptedFolder(TensorView):
    """A base model with a LoRA adapter merged into it while it is read.

    The tensors of the adapter are held in memory.

    Args:
        source: the base model, open.
        adapter: folder of the adapter.
    Attributes:
        tensors: those of the base, and those that the adapter adds.
    Raises:
        UserError: naming the adapter and the key or tensor, if it cannot be merged exactly.
    """

    def __init__(self, source: TensorSource, adapter: Path):
        super().__init__(source)
        self.adapter = Path(adapter)
        config = _read_adapter_config(self.adapter)
        with ModelFolder(self.adapter / ADAPTER_FILE) as stored:
            tensors = {name: stored.read(name) for name in stored.tensors}
            self._digest = stored.compute_digest()
        self._updates: dict[str, _WeightUpdate] = {}
        self._biases: dict[str, Tensor] = {}
        self._replaced: dict[str, Tensor] = {}
        modules: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            match = re.fullmatch(r"(.+)\.(lora_\w+?)(?:\.(weight|bias))?", name)
            if match is None:
                self._replace_tensor(name, tensor)
            else:
                part = f"{match[2]}.{match[3]}" if match[3] == "bias" else match[2]
                modules.setdefault(match[1], {})[part] = tensor
        for module, parts in modules.items():
            self._record_module_update(module, parts, config)

    def _record_module_update(
        self, module: str, parts: dict[str, Tensor], config: Mapping[str, object]
    ) -> None:
        """Record the update of one module: of its weight, and of its bias if the adapter has one.

        Args:
            parts: its tensors by kind, such as "lora_A" or "lora_B.bias".
            config: content of adapter_config.json.
        Raises:
            UserError: if the parts are not those of LoRA, or do not fit the base.
        """
        embedding = "lora_embedding_A" in parts
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        allowed = {*keys, "lora_B.bias", "lora_magnitude_vector"}
        if not set(keys) <= parts.keys() <= allowed:
            raise UserError(
                f"{self.adapter}: {module} has {', '.join(sorted(parts))}; LoRA with {keys[0]} and "
                f"{keys[1]} can be merged"
            )
        down, up = (parts[key].float() for key in keys)
        name = self._find_base_tensor(f"{module}.weight")
        spec = self.tensors[name]
        plain, transposed = (len(up), down.shape[1]), (down.shape[1], len(up))
        if embedding:
            plain = None
        if down.dim() != 2 or up.dim() != 2 or spec.shape not in (plain, transposed):
            raise UserError(
                f"{self.adapter}: {module} is of shape {list(up.shape)} x {list(down.shape)}, but "
                f"{name} of {describe_source(self.source)} is {list(spec.shape)}"
            )
        square = plain == transposed
        is_transposed = bool(config.get("fan_in_fan_out")) if square else spec.shape == transposed
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None and is_transposed:
            raise UserError(
                f"{self.adapter}: use_dora on {module}, whose weight is transposed or an "
                "embedding; merge it with peft (merge_and_unload) first"
            )
        alpha = _match_module_pattern(
            config.get("alpha_pattern") or {}, module, config["lora_alpha"]
        )
        rank = len(down)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        magnitude = None if magnitude is None else magnitude.float().flatten()
        self._updates[name] = _WeightUpdate(down, up, scale, is_transposed, magnitude)
        if "lora_B.bias" in parts:
            self._biases[self._find_base_tensor(f"{module}.bias")] = (
                parts["lora_B.bias"].float() * scale
            )

    def _replace_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace the base's tensor `name` by `tensor`, which the adapter stores whole.

        It is of `modules_to_save`, or a bias. A tensor that the base lacks, such as that of a head,
        is added.

        Raises:
            UserError: if it has another shape in the base, or is one of trained rows.
        """
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if "token_adapter" in name or "trainable_tokens" in name:
            raise UserError(
                f"{self.adapter}: {name}: trained rows of embeddings are not supported; merge it "
                "with peft (merge_and_unload) first"
            )
        known = self._find_base_tensor(name, required=False)
        if known is not None and self.tensors[known].shape != tuple(tensor.shape):
            raise UserError(
                f"{self.adapter}: {name} has shape {list(tensor.shape)}, but "
                f"{list(self.tensors[known].shape)} in {describe_source(self.source)}; the "
                "adapter was made for a model with other words or labels"
            )
        key = known or name
        self.tensors[key] = TensorSpec(tensor.dtype, tuple(tensor.shape))
        self._replaced[key] = tensor

    def _find_base_tensor(self, name: str, required: bool = True) -> str | None:
        """Find a tensor's name in the base, whose backbone prefix may not be the adapter's.

        Args:
            name: in the adapter, without `PREFIX`.
            required: refuse a tensor that the base does not store; False: return None.

        Raises:
            UserError: if it is required and missing, or several names would fit.
        """
        if name in self.tensors:
            return name
        short = name.partition(".")[2]
        longer = [key for key in self.tensors if key.endswith(f".{name}")]
        if short in self.tensors:
            return short
        if len(longer) == 1:
            return longer[0]
        if required:
            raise UserError(
                f"{self.adapter}: adapts {name}, which {describe_source(self.source)} does not "
                "store; is it the base that the adapter was trained on?"
            )
        return None

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer (1-D, of the tensor's dtype) with elements of `name` from `start` on.

        The update is added in float32 (float64 for a base in float64), then rounded.
        """
        update, bias = self._updates.get(name), self._biases.get(name)
        if update is None:
            self._read_base_or_replacement(name, start, buffer)
            if bias is not None:
                buffer.copy_(buffer.float() + bias[start : start + len(buffer)])
            return
        width = self.tensors[name].shape[1]
        first, last = start // width, -(-(start + len(buffer)) // width)
        rows = torch.empty((last - first) * width, dtype=buffer.dtype)
        self._read_base_or_replacement(name, first * width, rows)
        total = rows.view(-1, width).to(torch.promote_types(torch.float32, rows.dtype))
        total = total + update.compute_rows(first, last)
        if update.magnitude is not None:
            total *= (update.magnitude[first:last] / total.norm(dim=1))[:, None]
        buffer.copy_(total.view(-1)[start - first * width :][: len(buffer)])

    def _read_base_or_replacement(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer with elements of the tensor `name` from `start` on, without its update.

        They are the adapter's if it stores the tensor whole, else the base's.
        """
        if name in self._replaced:
            buffer.copy_(self._replaced[name].reshape(-1)[start : start + len(buffer)])
        else:
            self.source.read_into(name, start, buffer)

    def compute_digest(self) -> str:
        """Compute the digest of the weights on disk: of the base, `+`, of the adapter. Those of the
        base are read.
        """
        return f"{self.source.compute_digest()}+{self._digest}"


@contextmanager
def open_weights(folder: Path, member: str | None = None) -> Iterator[TensorSource]:
    """Open the weights of a folder for a `with` block: of its model, or, if it holds a LoRA
    adapter, of the seed model that it names with the adapter merged in.

    The seed may be downloaded.

    Args:
        member: domain of one expert of a DEMix folder; None: all of it.
    Raises:
        UserError: if they cannot be read, or the adapter cannot be merged.
    """
    with ModelFolder(resolve_seed_folder(folder), member) as source:
        yield AdaptedFolder(source, folder) if is_adapter(folder) else source


def _read_adapter_config(adapter: Path) -> Mapping[str, object]:
    """Read adapter_config.json of a LoRA adapter, and check that it can be merged.

    Raises:
        UserError: naming the key that cannot be merged; or if there is no such file, or no weights
            in safetensors.
    """
    config, file = read_adapter_config(adapter), adapter / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; LORA can be merged")
    if not (adapter / ADAPTER_FILE).is_file():
        raise UserError(f"{adapter}: has no {ADAPTER_FILE}; save the adapter as safetensors")
    for key, value in config.items():
        if key not in _HANDLED and value not in (None, False, {}, [], ""):
            raise UserError(
                f"{file}: {key} is {value!r}, which cannot be merged here; merge it with peft "
                "(merge_and_unload) first"
            )
    initial = config.get("init_lora_weights")
    if initial not in _INITIAL:
        raise UserError(
            f"{file}: init_lora_weights is {initial!r}, which changes the base model too; merge it "
            "with peft (merge_and_unload) first"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"{file}: lora_alpha is {alpha!r}, not a number")
    return config


def _match_module_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, as in peft.

    Args:
        patterns: values by regular expression. A match starts at the beginning of the name or after
            a dot, and ends at its end.
        default: the result if none matches.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
