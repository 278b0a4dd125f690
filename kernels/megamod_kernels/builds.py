"""Tuned builds of all kernels, for ahead-of-time compilation by `compile_ahead`.

One function per operation, which lists its kernels with the launch settings of the tuned widths.
Not every combination of width, dtype and flags is listed, but each of their values is: registers
and shared memory are checked for both values of a flag, each at some widths.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from megamod_kernels import (
    demux,
    demux_kernels,
    instance_attention,
    mux,
    mux_attention,
    mux_attention_kernels,
    mux_embed,
    mux_embed_kernels,
    mux_kernels,
    norm_linear,
    norm_linear_kernels,
)
from megamod_kernels import instance_attention_kernels as instance_kernels
from megamod_kernels import keyed_linear_kernels as keyed_kernels


@dataclass(frozen=True)
class Build:
    """One kernel with one set of constants.

    Attributes:
        name: for reports.
        kernel: a function under `triton.jit`.
        signature: argument to type, such as "*bf16", "i32", "fp32".
        constants: compile-time arguments.
        num_warps, num_stages: of Triton: warps of a program, stages of its software pipeline.
        aligned: arguments that are multiples of 16, which a launch detects itself.
    """

    name: str
    kernel: object
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...]


# Integer arguments of the kernels of `mux_embed` and `mux_attention`.
_MUX_EMBED_COUNTS = (
    "rows", "length", "D", "N", "start", "first_stride", "second_stride", "position_stride",
    "blocks", "token_count", "count", "padding",
)  # fmt: skip


def list_mux_builds() -> Iterator[Build]:
    """List the builds of the kernels of `multiplex` at the tuned widths."""
    for size in (768, 1024, 1536, 2048):
        for dtype in ("bf16", "fp32"):
            tensors = dict.fromkeys(("x", "key", "mixed", "upstream", "grad_x"), f"*{dtype}")
            signature = tensors | {"partial": "*fp32"}
            signature |= dict.fromkeys(("rows", "length", "D", "N", "blocks"), "i32")
            constants = {"ROWS": mux.ROWS, "WIDTH": mux.WIDTH}
            aligned = ("upstream", "x", "key", "grad_x", "partial", "mixed", "D")
            for kernel, more in (
                (mux_kernels.multiplex_fwd_kernel, {}),
                (mux_kernels.multiplex_bwd_kernel, {"GRAD_X": True, "GRAD_KEY": True}),
                (mux_kernels.multiplex_bwd_kernel, {"GRAD_X": True, "GRAD_KEY": False}),
            ):
                names = kernel.arg_names
                key = "-key" if more.get("GRAD_KEY") else ""
                yield Build(
                    name=f"{kernel.__name__}{key}-D{size}-{dtype}",
                    kernel=kernel,
                    signature={name: signature[name] for name in names if name in signature},
                    constants=constants | more,
                    num_warps=4,
                    num_stages=3,
                    aligned=tuple(name for name in aligned if name in names),
                )


def _make_mux_embed_flags(size: int, dropout: bool) -> dict[str, object]:
    """Make the compile-time arguments of embedding kernels with every optional input passed.

    `size` is the hidden size D; `dropout`: with dropout.
    """
    flags = {"TYPES": 1, "FIRSTS": True, "SECONDS": True, "POSITIONS": True, "KEEP": True}
    flags |= {"MIXED": False, "SECOND": False, "DROPOUT": dropout}
    return flags | {"CHUNK": mux_embed.CHUNK, **mux_embed.make_width_arguments(size)}


def _list_mux_embed_types(names: Iterable[str], dtype: str) -> dict[str, str]:
    """Map argument names to types, as in `Build.signature`; most tensors are of `dtype`.

    `dtype` is "bf16" or "fp32".
    """
    kinds = dict.fromkeys(names, f"*{dtype}")
    kinds |= dict.fromkeys(
        ("stats", "second_stats", "partial", "head", "tail", "sums", "second_sums"), "*fp32"
    )
    whole = ("ids", "types", "firsts", "seconds", "positions", "seed", "order")
    kinds |= (
        dict.fromkeys(whole, "*i64") | {"owner": "*i32"} | dict.fromkeys(("eps", "dropout"), "fp32")
    )
    return kinds | dict.fromkeys(_MUX_EMBED_COUNTS, "i32")


def list_mux_embed_builds() -> Iterator[Build]:
    """List the builds of the kernels of `mux_embed` at the tuned widths."""
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
            # The others' 4 rows, and 1 or 4 warps, are those of `mux_embed_backward`.
            flags = {
                "ROWS": mux_embed.count_rows_per_program(size) if rowwise else 4,
                **_make_mux_embed_flags(size, drop),
            }
            constants = {name: flags[name] for name in names if name in flags}
            if drop and "DROPOUT" not in constants:
                continue
            kinds = _list_mux_embed_types(names, dtype)
            signature = {name: kinds[name] for name in names if name not in constants}
            aligned = [name for name in signature if signature[name][0] == "*"]
            yield Build(
                name=f"{kernel.__name__}-D{size}-{dtype}{'-dropout' * drop}",
                kernel=kernel,
                signature=signature,
                constants=constants,
                num_warps=mux_embed.count_warps(size) if rowwise else 1 if "owner" in names else 4,
                num_stages=3,
                aligned=(*aligned, "D"),
            )


def list_mux_attention_builds() -> Iterator[Build]:
    """List the builds of the kernel of `mux_attention` at the tuned widths."""
    names = mux_attention_kernels.mux_qkv_kernel.arg_names
    # Mixed rows that select each of the tiles, at D = 768; at other widths the largest tile alone.
    for size, rows, dtype, itemsize in (
        (768, 4096, "bf16", 2),
        (768, 8192, "bf16", 2),
        (768, 16384, "bf16", 2),
        (768, 16384, "fp32", 4),
        (1024, 16384, "bf16", 2),
        (1536, 16384, "bf16", 2),
        (2048, 16384, "bf16", 2),
    ):
        tile_rows, tile_columns, inner, warps, stages = mux_attention.select_matmul_tile(
            rows, itemsize
        )
        constants = {
            "ROWS": mux_attention.count_embedded_rows(size),
            "TILE_ROWS": tile_rows,
            "COLUMNS": tile_columns,
            "INNER": inner,
        }
        constants |= _make_mux_embed_flags(size, dropout=size == 768)
        constants = {name: value for name, value in constants.items() if name in names}
        kinds = _list_mux_embed_types(names, dtype)
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


def list_instance_attention_builds() -> list[Build]:
    """List the builds of `instance_attention`, with N = 5 and, with dropout, N = 12.

    In bf16 these select the tiles of 32 and of 64 rows.
    """
    builds = []
    types = {"mask": "*i1", "seed": "*i64", "scale": "fp32", "dropout": "fp32"}
    for size, dtype, instances in product((768, 1024, 2048), ("bf16", "fp32"), (5, 12)):
        head, drops = 128 if size == 2048 else 64, instances == 12
        rows, warps = instance_kernels.select_rows_and_warps(
            instances, head, 2 if dtype == "bf16" else 4
        )
        constants = instance_kernels.make_compile_time_arguments(
            instances, size // head, head, rows, instance_attention.MASKED, drops
        )
        for kernel in (
            instance_kernels.instance_attention_fwd_kernel,
            instance_kernels.instance_attention_bwd_kernel,
        ):
            names = [name for name in kernel.arg_names if name not in constants]
            tensors = (
                "upstream",
                "q",
                "k",
                "v",
                "output",
                "grad_q",
                "grad_k",
                "grad_v",
                "mask",
                "seed",
            )
            pointers = {name: f"*{dtype}" for name in tensors if name in names}
            strides = [name for name in names if name.endswith("_stride")]
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


def list_keyed_linear_builds() -> list[Build]:
    """List the builds of `keyed_linear` with every tile; no kernel depends on D.

    Of a product's `rows` 2**20 select the tile of large products, 1 that of small ones.
    """
    types = dict.fromkeys(("rows", "positions", "part_positions", "length", "N"), "i32")
    aligned_counts = ("IN", "OUT", "weight_in_stride", "weight_out_stride")
    types |= dict.fromkeys(aligned_counts, "i32")
    types |= dict.fromkeys(("weight_partial", "key_partial"), "*fp32")
    variants = []
    for dtype, rows in (("bf16", 2**20), ("bf16", 1), ("fp32", 2**20)):
        *blocks, warps, stages = keyed_kernels.select_matmul_tile(
            rows, 768, 2 if dtype == "bf16" else 4
        )
        for forward, one_key in product((True, False), repeat=2):
            constants = dict(zip(("ROWS", "COLUMNS", "INNER"), blocks, strict=True))
            constants |= {"ONE_KEY": one_key, "FORWARD": forward, "BIAS": forward}
            constants["weight_in_stride" if forward else "weight_out_stride"] = 1
            variants.append((keyed_kernels.keyed_matmul_kernel, dtype, constants, warps, stages))
    for dtype, key_grad in product(("bf16", "fp32"), (True, False)):
        *blocks, warps, stages = keyed_kernels.select_weight_tile(
            2 if dtype == "bf16" else 4, key_grad
        )
        constants = dict(zip(("COLUMNS", "INNER", "ROWS"), blocks, strict=True))
        constants["GRAD_KEY"] = key_grad
        variants.append((keyed_kernels.keyed_weight_kernel, dtype, constants, warps, stages))
    return [
        Build(
            name=f"{kernel.__name__}-{dtype}-" + "-".join(str(x) for x in constants.values()),
            kernel=kernel,
            signature={name: kinds[name] for name in kernel.arg_names if name not in constants},
            constants=constants,
            num_warps=warps,
            num_stages=stages,
            aligned=tuple(
                name
                for name in kernel.arg_names
                if name not in constants and (kinds[name][0] == "*" or name in aligned_counts)
            ),
        )
        for kernel, dtype, constants, warps, stages in variants
        for kinds in ({name: f"*{dtype}" for name in kernel.arg_names} | types,)
    ]


def list_norm_linear_builds() -> Iterator[Build]:
    """List the builds of `norm_linear` with every tile; no kernel is compiled for a certain D.

    Of a product's `rows` 2**20 select the tile of large products, 1 that of small ones.
    """
    variants = []
    for dtype, rows in (("bf16", 2**20), ("bf16", 1), ("fp32", 2**20)):
        *tile, warps, stages = keyed_kernels.select_matmul_tile(
            rows, 768, 2 if dtype == "bf16" else 4
        )
        constants = dict(zip(("ROWS", "COLUMNS", "INNER"), tile, strict=True))
        constants["BIAS"] = True
        variants.append((norm_linear_kernels.norm_matmul_kernel, dtype, constants, warps, stages))
        if rows > 1:
            constants = {"ROWS": norm_linear.ROWS, "WIDTH": norm_linear.WIDTH}
            variants.append((norm_linear_kernels.norm_moments_kernel, dtype, constants, 4, 3))
    counts = ("rows", "D", "OUT", "weight_out_stride")
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
            aligned=(*pointers, "D", "OUT", "weight_out_stride"),
        )


def list_demux_builds() -> Iterator[Build]:
    """List the builds of the kernels of `rsa_demux` at the tuned widths.

    Pairs are compiled at D = 1024 and dropout at D = 768: every kernel is listed with and without
    each of them, and the number of builds stays that of the widths.
    """
    types = {"pair_position": "*i64", "pair_instance": "*i64", "seed": "*i64", "partial": "*fp32"}
    types |= dict.fromkeys(("dropout", "eps"), "fp32")
    types |= dict.fromkeys(("rows", "D", "N", "length", "blocks", "positions"), "i32")
    for size, (dtype, itemsize) in product((768, 1024, 1536, 2048), (("bf16", 2), ("fp32", 4))):
        if size == 1536 and dtype == "fp32":
            continue  # one row per program, as at 2048
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
                flags = demux.select_matmul_launch(size * 8, size, itemsize) | layers
            else:
                flags = (
                    demux.select_whole_row_launch
                    if "TILES" in kernel.arg_names
                    else demux.select_column_tile_launch
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
    "mux": list_mux_builds,
    "mux_embed": list_mux_embed_builds,
    "mux_attention": list_mux_attention_builds,
    "instance_attention": list_instance_attention_builds,
    "keyed_linear": list_keyed_linear_builds,
    "norm_linear": list_norm_linear_builds,
    "demux": list_demux_builds,
}
