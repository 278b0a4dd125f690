"""Tuned builds of all kernels, for ahead-of-time compilation by `compile_ahead`.

One function per operation, which yields its kernels with the launch settings of the tuned widths.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from megamod_kernels import (
    demux,
    demux_kernels,
    mux,
    mux_attention,
    mux_attention_kernels,
    mux_embed,
    mux_embed_kernels,
    mux_kernels,
    norm_linear,
    norm_linear_kernels,
    slot_attention,
)
from megamod_kernels import keyed_linear_kernels as keyed_kernels
from megamod_kernels import slot_attention_kernels as slot_kernels


@dataclass(frozen=True)
class Build:
    """One kernel with one set of constants.

    Attributes:
        name: for reports.
        kernel: a function under `triton.jit`.
        signature: argument to type, such as "*bf16", "i32", "fp32".
        constants: compile-time arguments.
        aligned: arguments that are multiples of 16, which a launch detects itself.
    """

    name: str
    kernel: object
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...]


_MUX_EMBED_COUNTS = (
    "rows", "length", "D", "N", "start", "first_stride", "second_stride", "position_stride",
    "blocks", "every", "count", "padding",
)  # fmt: skip


def mux_builds() -> Iterator[Build]:
    """The kernels at the tuned widths, for ahead-of-time compilation."""
    for size in (768, 1024, 1536, 2048):
        for dtype in ("bf16", "fp32"):
            tensors = dict.fromkeys(("x", "key", "mixed", "upstream", "grad_x"), f"*{dtype}")
            signature = tensors | {"partial": "*fp32"}
            signature |= dict.fromkeys(("rows", "length", "D", "N", "blocks"), "i32")
            constants = {"BLOCK": mux.ROWS, "WIDTH": mux.COLUMNS}
            aligned = ("upstream", "x", "key", "grad_x", "partial", "mixed", "D")
            for kernel, more in (
                (mux_kernels.multiplex_fwd_kernel, {}),
                (mux_kernels.multiplex_bwd_kernel, {"OF_X": True, "OF_KEY": True}),
                (mux_kernels.multiplex_bwd_kernel, {"OF_X": True, "OF_KEY": False}),
            ):
                names = kernel.arg_names
                key = "-key" if more.get("OF_KEY") else ""
                yield Build(
                    name=f"{kernel.__name__}{key}-D{size}-{dtype}",
                    kernel=kernel,
                    signature={name: signature[name] for name in names if name in signature},
                    constants=constants | more,
                    num_warps=4,
                    num_stages=3,
                    aligned=tuple(name for name in aligned if name in names),
                )


def _mux_embed_flags(size: int, dropout: bool) -> dict[str, object]:
    """Compile-time arguments of kernels with all optional ids, for ahead-of-time compilation."""
    flags = {"TYPES": 1, "FIRSTS": True, "SECONDS": True, "POSITIONS": True, "KEEP": True}
    flags |= {"MIXED": False, "SECOND": False, "DROPOUT": dropout}
    return flags | {"CHUNK": mux_embed.CHUNK, **mux_embed.tiles(size)}


def _mux_embed_kinds(names: Iterable[str], dtype: str) -> dict[str, str]:
    """Argument types by name; tensors have the given dtype unless listed here."""
    kinds = dict.fromkeys(names, f"*{dtype}")
    kinds |= dict.fromkeys(
        ("stats", "second_stats", "partial", "head", "tail", "sums", "second_sums"), "*fp32"
    )
    whole = ("ids", "types", "firsts", "seconds", "positions", "seed", "order")
    kinds |= dict.fromkeys(whole, "*i64") | {"owner": "*i32"} | dict.fromkeys(("eps", "p"), "fp32")
    return kinds | dict.fromkeys(_MUX_EMBED_COUNTS, "i32")


def mux_embed_builds() -> Iterator[Build]:
    """The kernels at the tuned widths, with and without dropout, for ahead-of-time compilation."""
    by_rows = (mux_embed_kernels.mux_embed_fwd_kernel, mux_embed_kernels.mux_embed_bwd_kernel)
    others = (
        mux_embed_kernels.mux_embed_columns_kernel,
        mux_embed_kernels.mux_embed_table_kernel,
        mux_embed_kernels.mux_embed_join_kernel,
        mux_embed_kernels.mux_embed_finish_kernel,
    )
    for size, dtype, drop in product((768, 1024, 1536, 2048), ("bf16", "fp32"), (False, True)):
        # Tiles do not depend on dtype and dropout, so one width of each is enough.
        if size != 768 and (dtype == "fp32" or drop):
            continue
        for kernel in (*by_rows, *others):
            rowwise = kernel in by_rows
            names = kernel.arg_names
            flags = {
                "BLOCK": mux_embed.rows_per_program(size) if rowwise else 4,
                **_mux_embed_flags(size, drop),
            }
            constants = {name: flags[name] for name in names if name in flags}
            if drop and "DROPOUT" not in constants:
                continue
            kinds = _mux_embed_kinds(names, dtype)
            signature = {name: kinds[name] for name in names if name not in constants}
            aligned = [name for name in signature if signature[name][0] == "*"]
            yield Build(
                name=f"{kernel.__name__}-D{size}-{dtype}{'-dropout' * drop}",
                kernel=kernel,
                signature=signature,
                constants=constants,
                num_warps=mux_embed.warps(size) if rowwise else 1 if "owner" in names else 4,
                num_stages=3,
                aligned=(*aligned, "D"),
            )


def mux_attention_builds() -> Iterator[Build]:
    """The kernel at the tuned widths, for ahead-of-time compilation."""
    names = mux_attention_kernels.mux_qkv_kernel.arg_names
    for size, rows, dtype, itemsize in (
        (768, 4096, "bf16", 2),
        (768, 8192, "bf16", 2),
        (768, 16384, "bf16", 2),
        (768, 16384, "fp32", 4),
        (1024, 16384, "bf16", 2),
        (1536, 16384, "bf16", 2),
        (2048, 16384, "bf16", 2),
    ):
        tile_rows, tile_columns, inner, warps, stages = mux_attention.product_tile(rows, itemsize)
        constants = {
            "BLOCK": mux_attention.rows_at_once(size),
            "TALL": tile_rows,
            "WIDE": tile_columns,
            "INNER": inner,
        }
        constants |= _mux_embed_flags(size, dropout=size == 768)
        constants = {name: value for name, value in constants.items() if name in names}
        kinds = _mux_embed_kinds(names, dtype)
        signature = {name: kinds[name] for name in names if name not in constants}
        yield Build(
            name=f"mux_qkv_kernel-D{size}-{tile_rows}-{dtype}",
            kernel=mux_attention_kernels.mux_qkv_kernel,
            signature=signature,
            constants=constants,
            num_warps=warps,
            num_stages=stages,
            aligned=(*(name for name, kind in signature.items() if kind[0] == "*"), "D"),
        )


def slot_attention_builds() -> list[Build]:
    """Ahead-of-time compilations of both tiles, with and without dropout."""
    builds = []
    types = {"mask_ptr": "*i1", "seed_ptr": "*i64", "scale": "fp32", "dropout": "fp32"}
    for size, dtype, instances in product((768, 1024, 2048), ("bf16", "fp32"), (5, 12)):
        head, drops = 128 if size == 2048 else 64, instances == 12
        rows, warps = slot_kernels.tile(instances, head, 2 if dtype == "bf16" else 4)
        constants = slot_kernels.constants_of(
            instances, size // head, head, rows, slot_attention.MASKED, drops
        )
        for kernel in (
            slot_kernels.slot_attention_fwd_kernel,
            slot_kernels.slot_attention_bwd_kernel,
        ):
            names = [name for name in kernel.arg_names if name not in constants]
            pointers = {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
            strides = [name for name in names if name.endswith(("_group", "_slot", "_token"))]
            builds.append(
                Build(
                    name=f"{kernel.__name__}-D{size}-N{instances}-{dtype}",
                    kernel=kernel,
                    signature=dict.fromkeys(names, "i32") | pointers | types,
                    constants=constants,
                    num_warps=warps,
                    num_stages=3,
                    aligned=(*pointers, *strides),
                )
            )
    return builds


def keyed_linear_builds() -> list[Build]:
    """Ahead-of-time compilations of every tile; no kernel depends on D."""
    variants = []
    for dtype, rows in (("bf16", 2**20), ("bf16", 1), ("fp32", 2**20)):
        *blocks, warps, stages = keyed_kernels.matmul_tile(rows, 768, 2 if dtype == "bf16" else 4)
        for forward, one_key in product((True, False), repeat=2):
            constants = dict(zip(("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN"), blocks, strict=True))
            constants |= {"ONE_KEY": one_key, "FORWARD": forward, "USES_BIAS": forward}
            constants["weight_in" if forward else "weight_out"] = 1
            variants.append((keyed_kernels.keyed_matmul_kernel, dtype, constants, warps, stages))
    for dtype, key_grad in product(("bf16", "fp32"), (True, False)):
        *blocks, warps, stages = keyed_kernels.weight_tile(2 if dtype == "bf16" else 4, key_grad)
        constants = dict(zip(("BLOCK_OUT", "BLOCK_IN", "BLOCK_ROWS"), blocks, strict=True))
        constants["KEY_GRAD"] = key_grad
        variants.append((keyed_kernels.keyed_weight_kernel, dtype, constants, warps, stages))
    return [
        Build(
            name=f"{kernel.__name__}-{dtype}-" + "-".join(str(x) for x in constants.values()),
            kernel=kernel,
            signature={
                name: ("*fp32" if "part_ptr" in name else f"*{dtype}") if "_ptr" in name else "i32"
                for name in kernel.arg_names
                if name not in constants
            },
            constants=constants,
            num_warps=warps,
            num_stages=stages,
            aligned=tuple(
                name
                for name in kernel.arg_names
                if name not in constants
                and name.endswith(("_ptr", "IN", "OUT", "weight_in", "weight_out"))
            ),
        )
        for kernel, dtype, constants, warps, stages in variants
    ]


def norm_linear_builds() -> Iterator[Build]:
    """Ahead-of-time compilations of every tile; only moments depend on D."""
    variants = []
    for dtype, rows in (("bf16", 2**20), ("bf16", 1), ("fp32", 2**20)):
        *tile, warps, stages = keyed_kernels.matmul_tile(rows, 768, 2 if dtype == "bf16" else 4)
        constants = dict(zip(("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN"), tile, strict=True))
        constants["USES_BIAS"] = True
        variants.append((norm_linear_kernels.norm_matmul_kernel, dtype, constants, warps, stages))
        if rows > 1:
            constants = {"ROWS": norm_linear.ROWS, "WIDTH": norm_linear.WIDTH}
            variants.append((norm_linear_kernels.norm_moments_kernel, dtype, constants, 4, 3))
    counts = ("rows", "D", "OUT", "weight_out")
    for kernel, dtype, constants, warps, stages in variants:
        kinds = {name: f"*{dtype}" for name in kernel.arg_names}
        kinds |= dict.fromkeys(counts, "i32") | {"stats": "*fp32", "eps": "fp32"}
        signature = {name: kinds[name] for name in kernel.arg_names if name not in constants}
        pointers = (name for name, kind in signature.items() if kind[0] == "*")
        yield Build(
            name=f"{kernel.__name__}-{dtype}-" + "-".join(map(str, constants.values())),
            kernel=kernel,
            signature=signature,
            constants=constants,
            num_warps=warps,
            num_stages=stages,
            aligned=(*pointers, "D", "OUT", "weight_out"),
        )


def demux_builds() -> Iterator[Build]:
    """The kernels at the tuned widths, for ahead-of-time compilation."""
    types = {"pair_position": "*i64", "pair_instance": "*i64", "seed": "*i64", "partial": "*fp32"}
    types |= dict.fromkeys(("dropout", "eps"), "fp32")
    types |= dict.fromkeys(("rows", "D", "N", "L", "blocks", "positions"), "i32")
    for size, (dtype, itemsize) in product((768, 1024, 1536, 2048), (("bf16", 2), ("fp32", 4))):
        if size == 1536 and dtype == "fp32":
            continue  # as 2048
        for kernel, layers in (
            (demux_kernels.rsa_demux_state_kernel, {"LAYERS": 0}),
            (demux_kernels.rsa_demux_state_kernel, {"LAYERS": 1}),
            (demux_kernels.rsa_demux_matmul_kernel, {"LAYERS": 0, "LAST": True}),
            (demux_kernels.rsa_demux_matmul_kernel, {"LAYERS": 1, "LAST": True}),
            (demux_kernels.rsa_demux_finish_kernel, {}),
            (demux_kernels.rsa_demux_layer_bwd_kernel, {"LAYER": 0, "NORM": True}),
            (demux_kernels.rsa_demux_layer_bwd_kernel, {"LAYER": 1, "NORM": True}),
            (demux_kernels.rsa_demux_layer_bwd_kernel, {"LAYER": 0, "NORM": False}),
            (demux_kernels.rsa_demux_first_bwd_kernel, {}),
            (demux_kernels.rsa_demux_sums_bwd_kernel, {}),
        ):
            if kernel is demux_kernels.rsa_demux_matmul_kernel:
                flags = demux.matmul_launch(size * 8, size, itemsize) | layers
            else:
                flags = (
                    demux.whole_row_launch if "TILES" in kernel.arg_names else demux.tile_launch
                )(size, itemsize) | layers
            warps, stages = flags.pop("num_warps"), flags.pop("num_stages", 3)
            flags |= {"PAIRS": size == 1024, "DROPOUT": size == 768}
            constants = {name: flags[name] for name in kernel.arg_names if name in flags}
            signature = {
                name: types.get(name, f"*{dtype}")
                for name in kernel.arg_names
                if name not in constants
            }
            if kernel is demux_kernels.rsa_demux_first_bwd_kernel:
                signature["grad"] = "*fp32"
            number = "".join(str(int(number)) for number in layers.values())
            yield Build(
                name=f"{kernel.__name__}{number}-D{size}-{dtype}",
                kernel=kernel,
                signature=signature,
                constants=constants,
                num_warps=warps,
                num_stages=stages,
                aligned=(*(n for n, kind in signature.items() if kind[0] == "*"), "D"),
            )


BUILDS: dict[str, Callable[[], Iterable[Build]]] = {
    "mux": mux_builds,
    "mux_embed": mux_embed_builds,
    "mux_attention": mux_attention_builds,
    "slot_attention": slot_attention_builds,
    "keyed_linear": keyed_linear_builds,
    "norm_linear": norm_linear_builds,
    "demux": demux_builds,
}
