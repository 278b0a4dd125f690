# megamod in a container, for CPUs or for NVIDIA GPUs:
#     docker build --target cpu -t megamod .
#     docker build --target cuda -t megamod:cuda .
#     RUN="docker run --rm --user $(id -u):$(id -g) -v $PWD:/work"
#     $RUN megamod recipes --output_dir .
#     $RUN megamod preprocess --builtin --tokenizer sentencepiece:4096 --output_dir runs/data-bin
#     $RUN megamod pretrain launchers/recipes/quickstart.yaml --data runs/data-bin --output_dir runs/one
# In several processes (there are no launchers/*.py in the image):
#     $RUN --entrypoint deepspeed megamod --num_accelerators 2 --module megamod pretrain \
#         launchers/recipes/quickstart.yaml --data runs/data-bin \
#         --deepspeed ds_configs/cpu_smoke.json --output_dir runs/two
# Versions are those of constraints.txt. The wheels of torch bring the libraries of CUDA, so the image
# needs the driver of the host alone; the compiler is for Triton and the extensions of DeepSpeed.
# `--build-arg TORCH_INDEX=URL` takes torch for CPUs from a mirror.
ARG PYTHON=3.12
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM scratch AS sources
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megamod megamod
COPY kernels kernels
COPY launchers launchers
COPY ds_configs ds_configs

FROM python:${PYTHON}-slim AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
# HOME is where any user may write, for the caches of libraries under `docker run --user`.
ENV DS_BUILD_OPS=0 HOME=/tmp PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /megamod
COPY constraints.txt .

FROM base AS torch-cpu
ARG TORCH_INDEX
RUN pip install -c constraints.txt --index-url ${TORCH_INDEX} torch

FROM base AS torch-cuda
RUN pip install -c constraints.txt torch

FROM torch-cpu AS cpu
ENV DS_ACCELERATOR=cpu
COPY --from=sources / ./
RUN pip install -c constraints.txt '.[serve,completion]'
WORKDIR /work
ENTRYPOINT ["megamod"]

FROM torch-cuda AS cuda
COPY --from=sources / ./
RUN pip install -c constraints.txt '.[triton,serve,completion]'
WORKDIR /work
ENTRYPOINT ["megamod"]
