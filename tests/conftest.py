"""Environment of the whole suite: CPU, one thread, no network; and the way to start ranks."""

import os
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="megamod-extensions-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
