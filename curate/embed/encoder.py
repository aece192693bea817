"""open_clip models, wherever their weights are: images and captions in, unit vectors out.

Weights are read from safetensors, or by torch with `weights_only`: nothing is ever unpickled. Images arrive as uint8
and are normalised on the device; captions run at their real length if the text tower is causal or masks its padding,
else at the full context.
"""

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from curate import engine
from curate.embed.weights import Source
from curate.errors import UsageError, unknown
from pipelines.processor import bf16_instructions, gpu_has_bf16
from pipelines.terminal import first_line

if TYPE_CHECKING:
    import torch


def choose_device() -> str:
    """Name the device that embeds: the first visible GPU, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_precision(asked: str, device: str, source: Source) -> tuple[str, str]:
    """Resolve `auto` by what the hardware has, never by a timing, so that a rerun decides the same.

    Returns the precision and the reason. Raises: UsageError for an unknown name.
    """
    if asked not in ("auto", "bf16", "fp16", "fp32"):
        raise unknown("precision", asked, ("auto", "bf16", "fp16", "fp32"))
    if asked != "auto":
        return asked, "as asked"
    if device == "cuda":
        if gpu_has_bf16():
            return "bf16", "the GPU computes in bf16"
        return "fp16", "the GPU is too old for bf16"
    if source.is_small:
        return "fp32", "a model this small gains nothing from bf16 on a CPU"
    if kind := bf16_instructions():
        return "bf16", f"the processor has {kind}"
    return "fp32", "the processor has no bf16 instructions"


def describe_device(device: str) -> str:
    """Name the hardware for the manifest."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {torch.backends.cpu.get_cpu_capability()}"


@dataclass(frozen=True)
class Node:
    """What a machine has to embed with: its device and that device's name, the precision and why, its cores."""

    device: str
    described: str
    precision: str
    reason: str
    cores: int


def look(asked: str, source: Source) -> Node:
    """Find out what this machine has to embed with. Raises: UsageError for an unknown precision."""
    device = choose_device()
    return Node(device, describe_device(device), *choose_precision(asked, device, source), engine.cores())


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run each of torch's CPU operators on one thread; what runs side by side is whole batches."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Tokenizer:
    """The model's tokenizer, to i32 [n, context]; safe to call from several threads."""

    def __init__(self, source: Source) -> None:
        import open_clip

        _register(source)
        try:
            self._tokenize = open_clip.get_tokenizer(source.model)
        except Exception as error:
            raise UsageError(f"the tokenizer of {source.model} cannot be loaded: {first_line(error)[:300]}") from None
        self._lock = threading.Lock()  # Rust tokenizers refuse concurrent use

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Tokenize captions, padded or cut to the model's context."""
        with self._lock:
            tokens = self._tokenize(list(captions) or [""]).numpy()
        return np.asarray(tokens[: len(captions)], np.int32)


def _register(source: Source) -> None:
    import open_clip

    if source.config:
        open_clip.add_model_config(source.config)


class Encoder:
    """A loaded model. Safe to call from several threads.

    preprocess: the model's image config; dim: of its embeddings.
    """

    def __init__(self, source: Source, precision: str, device: str) -> None:
        import open_clip
        import torch

        self.device = torch.device(device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        with _quiet_root():
            self.model, native = _build(source, precision, self.device)
        self._autocast = partial(
            torch.autocast, self.device.type, self.dtype, enabled=precision != "fp32" and not native
        )
        self._input_dtype = self.dtype if native else torch.float32
        self.preprocess: dict[str, Any] = dict(open_clip.get_model_preprocess_cfg(self.model))
        mean, std = (torch.tensor(self.preprocess[name], device=self.device) for name in ("mean", "std"))
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1)
        self._shift = (-mean / std).view(1, -1, 1, 1)
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in self.model.visual.modules())
        # Networks of convolutions run a quarter faster with their channels side by side; a transformer has only one.
        self._layout = torch.channels_last if convolutions > 1 else torch.contiguous_format
        one_piece = hasattr(self.model, "positional_embedding")
        self._tower = self.model if one_piece else getattr(self.model, "text", self.model)
        self.cuts = _can_cut(self._tower)
        self._pad = _padding(self._tower)
        if self.cuts:
            _put_sequence_first(self._tower)
        self._lock = threading.Lock()
        self._cut_towers: dict[int, Any] = {}
        height, width = pair(self.preprocess["size"])
        self.dim = self.images(np.zeros((1, height, width, 3), np.uint8)).shape[1]

    def put(self, pixels_nhwc: np.ndarray) -> "torch.Tensor":
        """Bring pixels, u8 [n, h, w, 3], to the device; a GPU copies them while it computes other batches."""
        import torch

        x = torch.from_numpy(pixels_nhwc)
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def images(self, pixels_nhwc: "np.ndarray | torch.Tensor") -> np.ndarray:
        """Embed images. pixels: u8 [n, h, w, 3], as `images.transform` makes them. Returns unit rows f32 [n, d]."""
        import torch

        with torch.inference_mode(), self._autocast():
            x = self.put(pixels_nhwc) if isinstance(pixels_nhwc, np.ndarray) else pixels_nhwc
            x = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._layout)
            x = x.mul_(self._scale).add_(self._shift).to(self._input_dtype)
            return _unit(self.model.encode_image(x))

    def texts(self, tokens_nl: np.ndarray) -> np.ndarray:
        """Embed tokenized captions i32 [n, context], at the length of the longest. Returns unit rows f32 [n, d]."""
        import torch

        length = int(self.lengths(tokens_nl).max())
        with torch.inference_mode(), self._autocast():
            tokens = torch.from_numpy(np.ascontiguousarray(tokens_nl[:, :length])).to(self.device, torch.long)
            if not self.cuts:
                return _unit(self.model.encode_text(tokens))
            tower = self._cut(length)
            return _unit(tower.encode_text(tokens) if hasattr(tower, "encode_text") else tower(tokens))

    def lengths(self, tokens_nl: np.ndarray) -> np.ndarray:
        """Count the tokens i64 [n] that affect a caption's vector: those up to where a causal tower is read out."""
        if self._pad is not None:
            return np.asarray((np.arange(1, tokens_nl.shape[1] + 1) * (tokens_nl != self._pad)).max(axis=1).clip(1))
        if not self.cuts:
            return np.full(len(tokens_nl), tokens_nl.shape[1])
        if _pool_type(self._tower) == "argmax":
            return np.asarray(tokens_nl.argmax(axis=1) + 1)
        end = getattr(self._tower, "text_eos_id", getattr(self._tower, "eos_id", None))
        return np.asarray((tokens_nl == end).argmax(axis=1) + 1)

    def _cut(self, length: int) -> Any:
        """Return the text tower for a shorter context: the same weights, with positions and mask sliced."""
        import torch

        if length >= self._tower.positional_embedding.shape[0]:
            return self._tower
        with self._lock:
            if length not in self._cut_towers:
                tower = copy.copy(self._tower)
                tower._parameters, tower._buffers = dict(tower._parameters), dict(tower._buffers)
                tower.positional_embedding = torch.nn.Parameter(
                    self._tower.positional_embedding[:length], requires_grad=False
                )
                tower.attn_mask = self._tower.attn_mask[:length, :length]
                self._cut_towers[length] = tower
            return self._cut_towers[length]


def _build(source: Source, precision: str, device: "torch.device") -> tuple[Any, bool]:
    """Make the model and load its weights; says whether it computes in the precision by itself.

    Raises: UsageError when the weights do not fit or hold pickled objects.
    """
    import pickle

    import open_clip

    _register(source)
    try:
        native = _is_native(open_clip.get_model_config(source.model))
        model = open_clip.create_model(
            source.model,
            precision=precision if native else "fp32",
            device=device,
            load_weights=False,
            pretrained_text=False,
            force_preprocess_cfg=source.preprocess,
        )
    except Exception as error:
        raise UsageError(f"the model {source.model} cannot be built: {first_line(error)[:300]}") from None
    try:
        open_clip.load_checkpoint(model, source.checkpoint, weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{source.checkpoint} holds pickled objects, which are never loaded.", "convert it to safetensors"
        ) from None
    except Exception as error:
        told = f"{source.checkpoint} does not fit the model {source.model}: {first_line(error)[:300]}"
        raise UsageError(told) from None
    return model.eval().requires_grad_(False), native


def _is_native(config: dict[str, Any]) -> bool:
    """Say whether open_clip's own half precision works: only for CLIP's classic towers; others run under autocast.

    open_clip 3.3 mixes dtypes in CoCa and cannot convert a text projection with a bias.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    foreign = "timm_model_name" in vision or "hf_model_name" in text
    return not (foreign or config.get("custom_text") or text.get("proj_bias"))


@contextmanager
def _quiet_root() -> Iterator[None]:
    """Mute open_clip's notes on the root logger; missing weights are reported by this program."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def pair(size: Any) -> tuple[int, int]:
    """Read an image size as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _pool_type(tower: Any) -> str:
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")))


def _can_cut(tower: Any) -> bool:
    """Say whether a caption's padding cannot reach its vector: causal attention, read out at the end-of-text token."""
    causal = getattr(tower, "attn_mask", None) is not None and hasattr(tower, "positional_embedding")
    return causal and getattr(tower, "cls_emb", None) is None and _pool_type(tower) in ("argmax", "eos")


def _padding(tower: Any) -> int | None:
    """Return the token that a text tower (of transformers) masks by itself, in its attention and its pooling."""
    from open_clip.hf_model import HFTextEncoder

    return tower.config.pad_token_id if isinstance(tower, HFTextEncoder) else None


def _put_sequence_first(tower: Any) -> None:
    """Lay out a text tower's rows position by position, if its attention is torch's own: the same numbers, faster.

    Masked attention that gets batches first transposes them in place, and the product with what is then no longer a
    plain matrix copies its weights for every caption: on a CPU the whole tower takes half as long again.
    """
    import torch

    transformer: Any = getattr(tower, "transformer", None)
    attentions = [getattr(block, "attn", None) for block in getattr(transformer, "resblocks", ())]
    if getattr(transformer, "batch_first", False) and all(
        isinstance(attention, torch.nn.MultiheadAttention) for attention in attentions
    ):
        for part in (transformer, *attentions):
            part.batch_first = False


def _unit(features: Any) -> np.ndarray:
    """Normalise in fp32 (bf16 would round the norm), leaving NaN and zero rows for the caller to see."""
    if isinstance(features, tuple):
        features = features[0]
    features = features.float()
    return np.asarray((features / features.norm(dim=-1, keepdim=True)).cpu())
