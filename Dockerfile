# megamod in a container, for CPUs or for NVIDIA GPUs:
#     docker build --target cpu -t megamod .
#     docker build --target cuda -t megamod:cuda .
#     docker run --rm -v "$PWD:/work" megamod preprocess --builtin --tokenizer sentencepiece:4096 \
#         --output_dir runs/data-bin
# Versions are those of constraints.txt. The wheels of torch bring the libraries of CUDA, so the image
# needs the driver of the host alone; the compiler is for Triton and the extensions of DeepSpeed.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
ENV DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /megamod
COPY constraints.txt .

FROM base AS torch-cpu
RUN pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch

FROM base AS torch-cuda
RUN pip install -c constraints.txt torch

FROM torch-cpu AS cpu
ENV DS_ACCELERATOR=cpu
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megamod megamod
COPY kernels kernels
COPY launchers launchers
COPY ds_configs ds_configs
RUN pip install -c constraints.txt '.[serve,completion]'
WORKDIR /work
ENTRYPOINT ["megamod"]

FROM torch-cuda AS cuda
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megamod megamod
COPY kernels kernels
COPY launchers launchers
COPY ds_configs ds_configs
RUN pip install -c constraints.txt '.[triton,serve,completion]'
WORKDIR /work
ENTRYPOINT ["megamod"]
