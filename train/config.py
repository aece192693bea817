"""The options of a run: frozen dataclasses, read from the tables of one TOML file.

    [model] what is trained · [align] [finetune] the two stages · [export] · [eval] · [generate]

The same file may hold tables of other programs, which are ignored here. pipelines/options.py checks the name and type
of every key of ours against the dataclass. In a string, `{here}` is the folder of the TOML file. `--set align.lr=1`
overrides a key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pipelines
from pipelines import options
from train.errors import UsageError, did_you_mean

Trees = Literal["", "short", "all"]  # the conversations that become message trees (data/message_tree.py)


@dataclass(frozen=True)
class Model:
    """A vision tower, a language model, and how they are joined.

    tower, lm: hub id (or ID@REVISION), local folder with weights, or folder with only a config.json (then `*_weights =
    "fresh"`); tower may also be a network of timm, an open_clip `local-dir:FOLDER`, or a file with an EVA02-CLIP-L.
    """

    tower: str = ""
    lm: str = ""
    tokenizer: str = ""  # default: that of `lm`
    tower_weights: Literal["pretrained", "fresh"] = "pretrained"
    lm_weights: Literal["pretrained", "fresh"] = "pretrained"
    image: Literal["square", "pad", "squash"] = "square"  # pad: filled to a square first; squash: each side resized
    feature_layer: int = -2  # index into the tower's hidden states; LLaVA and Bunny take the second to last
    feature_strategy: Literal["auto", "default", "full"] = "auto"  # default drops the first (class) token
    grid: int = 0  # average the feature map of a timm network to grid x grid places; 0: keep its own
    scales: int = 1  # S²: also see the image at 2, 3, … times the tower's size, in tiles; Bunny v1.1 takes 3
    lm_head_bias: Literal["fold", "drop"] = "fold"  # of Phi's head; drop: as in Bunny, whose class has no such bias
    scale_features: bool = False  # multiply by sqrt(hidden_size), as transformers before 5.4 did for Gemma
    template: str = ""  # of prompts.py, or "chat": the language model's own; "": "chat" if it has one, else "vicuna"
    image_token: str = "<image>"
    max_length: int = 2048
    shrink: Literal["", "tiny"] = ""  # tiny: same classes with a few thousand fresh weights a layer
    attention: str = "documents"  # see attention.py; or one of transformers' (sdpa, eager, flash_attention_2, …)
    gradient_checkpointing: bool = False
    compile: Literal["", "layers"] = ""  # layers: torch.compile, a layer at a time; the first steps take minutes
    seed: int = 0  # for drawing the projector and fresh weights


@dataclass(frozen=True)
class Stage:
    """One stage of training. A step takes `batch_size` samples; how they are split or packed changes no result."""

    tune: Literal["projector", "lora", "full"] = "projector"
    tune_tower: bool = False
    template: str = ""  # default: model.template
    start: Literal["", "words"] = ""  # words: set the projector in closed form (run/closed_form.py); "": random
    steps: int = 0  # 0: `epochs` passes over the data
    epochs: float = 1.0
    batch_size: int = 256
    lr: float = 1e-3
    projector_lr: float = 0.0  # 0: same as lr
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.03  # share of the steps
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm up, stay constant, fall linearly over the last `decay`
    decay: float = 0.2  # share of the steps; wsd only
    clip: float = 1.0  # gradient norm; 0: no clipping, as in the published scripts (their DeepSpeed files lack the key)
    loss_norm: Literal["token", "microbatch"] = "token"  # microbatch: mean of means, as before transformers 5
    norm_samples: int = 8  # samples in each of these means: the published scripts' samples per device and pass
    lm_dropout: Literal["learning", "always", "never"] = "learning"  # dropout of its config; always: also when frozen
    plain_eos: bool = True  # false: a newline ends a plain caption, as in LLaVA and Bunny; no stop token is learnt
    lora_rank: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    dora: bool = False  # PEFT's use_dora: train each weight's magnitude apart from its direction (arXiv:2402.09353)
    rslora: bool = False  # PEFT's use_rslora: scale by alpha / sqrt(rank), not alpha / rank (arXiv:2312.03732)
    quantize: Literal["", "nf4"] = ""  # nf4: QLoRA, the frozen language model in 4 bits (extra `qlora`)
    message_trees: Trees = ""  # train on each question about a picture separately (data/message_tree.py)
    packing: bool = True  # samples side by side in one row, each seeing only itself; false: padded rows
    micro_tokens: int = 16384  # most tokens, with padding, in one pass; a GPU lowers this default to what fits
    micro_images: int = 64  # most images in one forward pass
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int | Literal["auto"] = "auto"  # decoding processes per rank (train/data/workers.py); 0: no extra ones
    cache_features_mb: int = 0  # keep a frozen tower's features in memory, if all of them fit
    shard: bool = False  # FSDP2: shard the model over the processes, if one GPU cannot hold it
    val: str = ""  # held-out data, or the share of --data to hold out (0.02); its loss selects the weights kept
    losses: bool = False  # write each sample's loss to RUN/losses, a sidecar that `curate select --losses` reads
    tracker: Literal["", "trackio", "wandb"] = ""  # in addition to TensorBoard, if that is installed
    save_every: int = 200
    keep_last: int = 2
    peak_tflops: float = 0.0  # of one device, for MFU; 0: known GPUs in bf16 only, else no MFU
    max_bad_share: float = 0.001  # stop above this share of unusable samples; 3 or fewer pass, unless half of all
    seed: int = 0

    @property
    def lora_scale(self) -> float:
        """The factor on the product of LoRA's two matrices."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)

    @property
    def num_workers(self) -> int:
        """The decoding processes per rank, once `auto` has been resolved."""
        assert self.workers != "auto"
        return self.workers


@dataclass(frozen=True)
class Export:
    """How an llava-hf folder is written."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"


@dataclass(frozen=True)
class Eval:
    """How answers are produced for scoring."""

    batch_size: int = 16
    max_new_tokens: int = 0  # 0: 64 for held-out records; for benchmarks as in the papers (128; MM-Vet 1024)
    perplexity: bool = True  # of the true answers of held-out records; without it, eval on them takes half the time
    candidates: int = 0  # held-out records: rank each picture's text among this many by likelihood; 0: do not rank
    limit: int = 0  # 0: all
    show: int = 8
    published: dict[str, float] = field(default_factory=dict)  # scores to compare ours with, {pope = 86.8, …}
    tolerance: float = 0.02  # share of a published score by which ours may miss it


@dataclass(frozen=True)
class Generate:
    """How a question is answered."""

    max_new_tokens: int = 128
    system: str = ""


@dataclass(frozen=True)
class Config:
    """Everything a TOML file says to this program."""

    model: Model = field(default_factory=Model)
    align: Stage = field(default_factory=lambda: Stage(template="plain"))
    finetune: Stage = field(default_factory=lambda: Stage(tune="lora", batch_size=128, lr=2e-4, projector_lr=2e-5))
    export: Export = field(default_factory=Export)
    eval: Eval = field(default_factory=Eval)
    generate: Generate = field(default_factory=Generate)


# Options that manifests of 0.1.0 lack. A manifest omits them at their default, so that older runs can still resume.
ADDED = frozenset("norm_samples lm_dropout schedule decay dora rslora val grid compile start message_trees".split())
TABLES = tuple(f.name for f in dataclasses.fields(Config))
NEIGHBOURS = "about demo pool data import embed cluster select emit report mix ablation".split()


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (or none) and apply `table.key=value` overrides.

    Raises: UsageError for a missing file, an unknown table or key, a value of the wrong type.
    """
    tables = _read_toml(Path(path)) if path else {}
    config = Config()
    try:
        for override in overrides:
            table, *keys = options.parse_setting(override)[0]
            if not keys:
                raise UsageError(f"--set {override!r}: write it as table.key=value, for example align.lr=1e-3")
            if table not in (*TABLES, *NEIGHBOURS):
                raise UsageError(f"--set {override!r}: unknown table {table!r}{did_you_mean(table, TABLES)}")
            if table in TABLES:  # `--set embed.model=…` is for `curate`
                options.assign(tables, override)
        for table in tables.values():
            share = table.get("val") if isinstance(table, dict) else None
            if isinstance(share, int | float) and not isinstance(share, bool):  # --val gives it as a string
                table["val"] = str(share) if share else ""
        changes = {
            name: options.build(type(defaults := getattr(config, name)), table, name, defaults)
            for name, table in tables.items()
        }
    except options.OptionError as error:
        raise UsageError(f"{error.message} {error.hint}" if error.hint else error.message) from None
    config = dataclasses.replace(config, **changes)
    _check(config)
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of this program from a file, merged over its bases."""
    try:
        document = pipelines.read(path)
    except FileNotFoundError as error:
        raise UsageError(f"no configuration file at {error.filename}") from None
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for name in (name for name in document if name not in (*NEIGHBOURS, *TABLES)):
        near = difflib.get_close_matches(name, TABLES, n=1, cutoff=0.75)
        if near:
            raise UsageError(f"{path}: unknown table [{name}]; did you mean [{near[0]}]?")
    return {name: table for name, table in document.items() if name in TABLES}


def _check(config: Config) -> None:
    model, evaluation = config.model, config.eval
    for name, stage in (("align", config.align), ("finetune", config.finetune)):
        positive = (
            "batch_size norm_samples lr micro_tokens micro_images save_every keep_last lora_rank lora_alpha epochs"
        )
        _hold(name, stage, positive, lambda value: value > 0, "be greater than 0")
        _hold(name, stage, "epochs lora_rank", lambda value: value <= 1e5, "be at most 100,000")
        _hold(name, stage, "batch_size", lambda value: value <= 1e6, "be at most 1,000,000")
        unsigned = "steps projector_lr weight_decay clip workers cache_features_mb peak_tflops"
        _hold(name, stage, unsigned, lambda value: value == "auto" or value >= 0, "not be negative")
        _hold(name, stage, "warmup decay lora_dropout max_bad_share", lambda value: 0 <= value <= 1, "lie in [0, 1]")
        _hold(name, stage, "seed", lambda value: 0 <= value < 2**63, "lie in [0, 2^63)")
        _hold(name, stage, "betas", lambda value: 0 <= value < 1, "lie in [0, 1)")
        if stage.quantize and (stage.tune != "lora" or stage.shard):
            raise UsageError(f'{name}.quantize needs {name}.tune = "lora", without {name}.shard')
        _hold(name, stage, "val", lambda value: 0 <= share_of(value) < 1, "be less than 1, or a data set")
        if (stage.dora or stage.rslora) and stage.tune != "lora":
            raise UsageError(f'{name}.{"dora" if stage.dora else "rslora"} needs {name}.tune = "lora"')
        if stage.message_trees and not stage.packing:
            raise UsageError(f"{name}.message_trees needs {name}.packing: padded rows have no branches")
        if stage.start and stage.shard:
            raise UsageError(f"{name}.start does not go with {name}.shard: it sets the whole projector at once")
        if stage.dora and stage.shard:
            raise UsageError(f"{name}.dora does not go with {name}.shard: it takes norms of whole weights")
        if model.compile and (stage.shard or stage.quantize):
            raise UsageError(f"model.compile does not go with {name}.{'shard' if stage.shard else 'quantize'}")
        if stage.tune == "projector" and stage.tune_tower:
            raise UsageError(f'{name}.tune_tower needs {name}.tune = "lora" or "full"')
    _hold("model", model, "max_length scales", lambda value: value > 0, "be greater than 0")
    _hold("model", model, "seed", lambda value: abs(value) < 2**62, "lie between -2^62 and 2^62")
    _hold("model", model, "grid", lambda value: value >= 0, "not be negative")
    _hold("model", model, "image_token", bool, "name a token, of the tokenizer or a new one")
    _hold("eval", evaluation, "batch_size", lambda value: value > 0, "be greater than 0")
    _hold(
        "eval",
        evaluation,
        "candidates max_new_tokens limit show tolerance",
        lambda value: value >= 0,
        "not be negative",
    )
    _hold("generate", config.generate, "max_new_tokens", lambda value: value > 0, "be greater than 0")


def share_of(val: str) -> float:
    """Return the share that `val` names; 0 where it names data, or nothing."""
    try:
        return float(val)
    except ValueError:
        return 0.0


def _hold(table: str, options: Any, keys: str, rule: Callable[[Any], bool], words: str) -> None:
    for key in keys.split():
        value = getattr(options, key)
        if not all(map(rule, value if isinstance(value, tuple) else (value,))):
            raise UsageError(f"{table}.{key} = {value!r} must {words}")
