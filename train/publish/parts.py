"""The parts of a model, each in the usual published form, for tools that take them one by one (llama.cpp's GGUF).

    language_model/     a causal language model with its tokenizer and chat template
    vision_tower/       a CLIP, SigLIP or DINOv2 model with its image preparation
    llava.projector     a torch file of four tensors under LLaVA's names
    README.md           the commands that turn them into GGUF

Source of the names: llama.cpp, tools/mtmd/legacy-models (llava_surgery_v2.py, convert_image_encoder_to_gguf.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.data.chat import own_source
from train.errors import UsageError
from train.folder import write_json
from train.model.compose import own_tower
from train.model.weights import let_read, write_shards
from train.publish.older_readers import write_for_older_readers

INFIX = ("clip_vision_model", "siglip_vision_model")  # hub checkpoints of these keep their weights under vision_model.
PROJECTOR = "llava.projector"
README = """\
# Parts for GGUF

{language_model}/ and {vision_tower}/ are ordinary models of transformers, {projector} joins them. With llama.cpp:

    python convert_hf_to_gguf.py language_model --outfile model.gguf
    python tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py -m vision_tower \\
        --llava-projector llava.projector --output-dir . {flag} \\
        --image-mean {mean} --image-std {std}
    llama-mtmd-cli -m model.gguf --mmproj mmproj-model-f16.gguf --image X.jpg -p "What is this?"

The image encoder's converter is written for transformers 4.
"""


def write_parts(model: Any, tokenizer: Any, image_processor: Any, out: Path, dtype: torch.dtype) -> None:
    """Write the parts of a native model to a folder.  Raises: UsageError for a tower class of ours."""
    if own_tower(model.config):
        raise UsageError(f"--parts: {own_tower(model.config)} is not a transformers class, and no converter knows it")
    _language_model(model, dtype).save_pretrained(out / "language_model")
    let_read(*(out / "language_model").glob("*.safetensors"))
    model.generation_config.save_pretrained(out / "language_model")
    tokenizer.chat_template = own_source(tokenizer.chat_template)  # readers of the parts insert images themselves
    tokenizer.save_pretrained(out / "language_model")
    write_for_older_readers(out / "language_model")
    _write_tower(model, image_processor, out / "vision_tower", dtype)
    layers = {"linear_1": "0", "linear_2": "2"}
    projector = {
        f"model.mm_projector.{layers[name.split('.')[0]]}.{name.split('.')[1]}": tensor.detach().float().contiguous()
        for name, tensor in model.model.multi_modal_projector.state_dict().items()
    }
    torch.save(projector, out / PROJECTOR)
    kind = model.config.vision_config.model_type
    flag = {"clip_vision_model": "--clip-model-is-vision", "siglip_vision_model": "--clip-model-is-siglip"}.get(kind)
    words = {"mean": image_processor.image_mean, "std": image_processor.image_std}
    text = README.format(
        language_model="language_model",
        vision_tower="vision_tower",
        projector=PROJECTOR,
        flag=flag or "(no flag: it knows only CLIP and SigLIP)",
        **{name: " ".join(f"{value:g}" for value in values) for name, values in words.items()},
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _language_model(model: Any, dtype: torch.dtype) -> Any:
    """Put the native model's decoder and head back into their original class, sharing their memory."""
    from transformers import AutoModelForCausalLM

    config = model.config.text_config
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    setattr(lm, lm.base_model_prefix, model.model.language_model)
    head = lm.get_output_embeddings()
    head.weight = model.lm_head.weight
    if getattr(head, "bias", None) is not None:  # Phi's: the native class has none, so it is zero
        head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    lm.config.architectures = [type(lm).__name__]
    return lm.to(dtype)


def as_published(part: Any) -> dict[str, Tensor]:
    """Return the weights of a model of transformers under the names and in the tensors of its published checkpoints.

    transformers 5 keeps the experts of a mixture in one tensor, and some weights under other names than in files. Other
    readers know only the names in files, and version 4 draws at random what it does not find. So does version 5 with
    DINOv3's layer scales: its renaming pattern mistakes its own names for others.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = revert_weight_conversion(part, part.state_dict())
    of_one = {name for name, tensor in state.items() if tensor.untyped_storage().nbytes() != tensor.nbytes}
    # Each expert's slice of the tensor is stored separately.
    return {name: tensor.detach().clone() if name in of_one else tensor for name, tensor in state.items()}


def _write_tower(model: Any, image_processor: Any, out: Path, dtype: torch.dtype) -> None:
    tower = model.model.vision_tower
    prefix = "vision_model." if tower.config.model_type in INFIX else ""
    out.mkdir(parents=True)
    state = {prefix + name: tensor.detach().to(dtype).contiguous() for name, tensor in as_published(tower).items()}
    write_shards(state, out)
    tower.config.architectures, tower.config.dtype = [type(tower).__name__], dtype
    # All values, also defaults: converters read the file without knowing the class. By default they take layer -2.
    layer = model.config.vision_feature_layer
    values = tower.config.to_dict() | ({} if layer == -2 else {"vision_feature_layer": layer})
    write_json(out / "config.json", values)
    image_processor.save_pretrained(out)
