"""One small world for all tests of the trainer; its parts are made in toys.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from toys import make_clip, make_lm, write_captions, write_json, write_mixed

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders lm, clip, captions, mixed, llava, and a config.toml that names them."""
    root = tmp_path_factory.mktemp("world")
    make_lm(root / "lm")
    make_clip(root / "clip")
    write_captions(root / "captions", 48)
    write_mixed(root / "mixed", 40)
    write_json(root / "llava", 20)
    (root / "config.toml").write_text(
        """
[embed]
model = "somebody else's table"
[model]
tower = "local-dir:{here}/clip"
lm = "{here}/lm"
template = "qa"
feature_strategy = "full"
max_length = 64
[align]
template = "qa"
steps = 8
batch_size = 8
lr = 3e-3
workers = 0
[finetune]
steps = 6
batch_size = 8
lr = 2e-3
projector_lr = 1e-3
lora_rank = 4
lora_alpha = 8
workers = 0
[export]
dtype = "fp32"
"""
    )
    return root
