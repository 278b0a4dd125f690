"""Ahead-of-time compilation of all kernels: registers, shared memory and spills, without a GPU.

    python -m megamod_kernels.compile_ahead            all tuned builds, for sm_80 and sm_90
    python -m megamod_kernels.compile_ahead --json FILE demux
    python -m megamod_kernels.compile_ahead --reuse FILE --json FILE    changed builds only

Triton compiles to a cubin for any target; the tools in its wheel report the resources. Results and
speed are not checked. TRITON_INTERPRET must not be set.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.compiler.compiler import make_backend

from megamod_kernels.builds import BUILDS, Build

SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Largest shared memory of a block in bytes, by compute capability."""

WARP_SIZE = 32


def measure_resources(build: Build, capability: int) -> dict[str, int]:
    """Compile a build for a compute capability, such as 90, and return the resources it uses.

    Returns:
        per thread "registers" (number), "stack" (bytes) and "spills" (bytes that spilled registers
        store and load); per block "shared" (bytes).
    Raises:
        CompilationError: if Triton does not compile the kernel.
        CalledProcessError: if a tool of CUDA fails.
    """
    names = build.kernel.arg_names
    index = {name: (number,) for number, name in enumerate(names)}
    source = ASTSource(
        fn=build.kernel,
        signature={n: "constexpr" if n in build.constants else build.signature[n] for n in names},
        constexprs={index[name]: value for name, value in build.constants.items()},
        attrs={index[n]: [["tt.divisibility", 16]] for n in build.aligned if n in index},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, WARP_SIZE), options=options
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        used = _run_tool(tools / "cuobjdump", "-res-usage", cubin)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", used).groups())
        spills = 0
        if stack:  # spilled registers are on the stack, among others
            ptx.write_text(compiled.asm["ptx"])
            target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
            report = _run_tool(
                tools / "ptxas", "-v", f"--gpu-name={target}", ptx, "-o", "/dev/null"
            )
            spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))
    shared = compiled.metadata.shared
    return {"registers": registers, "stack": stack, "spills": spills, "shared": shared}


def compute_digest(build: Build, capability: int) -> str:
    """Compute a digest of all that decides the machine code of a build: source, settings, Triton.

    `capability` is the compute capability, such as 90. Triton's key of a kernel covers the
    functions it calls, and its line number.
    """
    settings = (build.signature, build.constants, build.aligned, build.num_warps, build.num_stages)
    text = f"{triton.__version__} {capability} {build.kernel.cache_key} {settings}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find_refused_arguments(build: Build) -> list[str]:
    """List the integer arguments of `build` for which its kernel does not compile when they are 1.

    A launch turns the value 1 into a constant, which lacks some methods of other integers. Only
    Triton's first stage is run, for sm_90.
    """
    target, names = GPUTarget("cuda", 90, WARP_SIZE), build.kernel.arg_names
    backend, refused = make_backend(target), []
    for argument in (name for name, kind in build.signature.items() if kind == "i32"):
        constants = {**build.constants, argument: 1}
        source = ASTSource(
            fn=build.kernel,
            signature={n: "constexpr" if n in constants else build.signature[n] for n in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        options, context = backend.parse_options({"num_warps": build.num_warps}), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen = backend.get_codegen_implementation(options), backend.get_module_map()
        try:
            source.make_ir(target, options, *codegen, context)
        except CompilationError:
            refused.append(argument)
    return refused


def list_builds(operations: Iterable[str]) -> Iterator[Build]:
    """Yield all tuned builds of some operations, named as in `BUILDS`."""
    for name in operations:
        yield from BUILDS[name]()


def list_faults(usage: Mapping[str, int], capability: int) -> list[str]:
    """List the faults of a build: stack, spills, too much shared memory; empty without any.

    Args:
        usage: result of `measure_resources` for this capability.
        capability: compute capability, such as 90.
    """
    listed = [f"{usage[name]} bytes of {name}" for name in ("stack", "spills") if usage[name]]
    limit = SHARED_LIMIT[capability]
    if usage["shared"] > limit:
        listed.append(f"{usage['shared']} bytes of shared memory, the limit is {limit}")
    return listed


def main() -> int:
    """Compile the requested builds and print a line for each; return 1 if one has faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(BUILDS)}; none: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="FILE",
        help="numbers of an earlier --json, taken for builds that have not changed since",
    )
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=tuple(SHARED_LIMIT), default=[80, 90]
    )
    args = parser.parse_args()
    if unknown := [name for name in args.operations if name not in BUILDS]:
        parser.error(f"{unknown[0]!r} is no operation with kernels; there are {', '.join(BUILDS)}")
    kept = {row["digest"]: row for row in json.loads(args.reuse.read_text())} if args.reuse else {}
    rows, bad = [], 0
    for build in list_builds(args.operations or BUILDS):
        for capability in args.capability:
            digest = compute_digest(build, capability)
            row = kept.get(digest) or {"digest": digest, **measure_resources(build, capability)}
            usage = {name: row[name] for name in ("registers", "stack", "spills", "shared")}
            listed = list_faults(usage, capability)
            bad += bool(listed)
            rows.append({"build": build.name, "capability": capability, **usage, "digest": digest})
            print(
                f"sm_{capability} {build.name:58} {usage['registers']:4} registers "
                f"{usage['shared']:7} shared  {'; '.join(listed)}",
                flush=True,
            )
    if args.json:
        lines = ",\n".join(map(json.dumps, rows))
        args.json.write_text(f"[\n{lines}\n]\n")
    return int(bad > 0)


def _run_tool(*command: object) -> str:
    """Run a command and return all its output as text; raise CalledProcessError if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
