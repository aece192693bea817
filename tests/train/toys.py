"""A small world for the trainer: an open_clip ViT, a word-level Llama, and pictures of coloured squares."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
WORDS = (
    "a an the square big small on dark light what colour is it how which where caption question answer : ? . , "
    "red green blue white one two three four monday tuesday after before comes day not yes no system user assistant"
).split()


def word_tokenizer():
    """Lower-case words; `<eos>` ends, unknown words are `<unk>`; no bos."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<eos>", "<image>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def make_lm(folder: Path) -> Path:
    """A Llama of two layers with a spare row in its embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """An open_clip folder with a random ViT 32/16."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 3, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.43, 0.43, 0.43], "std": [0.27, 0.27, 0.27], "interpolation": "bicubic"}
    torch.manual_seed(2)
    model = open_clip.CLIP(**config)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def picture(colour: str, big: bool, seed: int) -> bytes:
    """A JPEG of a coloured square on noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    array = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    side = 24 if big else 12
    at = (32 - side) // 2
    array[at : at + side, at : at + side] = COLOURS[colour]
    out = io.BytesIO()
    Image.fromarray(array).save(out, "JPEG", quality=90)
    return out.getvalue()


def sample(i: int) -> tuple[str, bool]:
    return list(COLOURS)[i % 4], i % 3 == 0


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_captions(folder: Path, num: int, shards: int = 2) -> Path:
    """Shards as emitted: key.jpg, key.txt, key.json without conversations."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for i in range(shard, num, shards):
                colour, big = sample(i)
                add(tar, f"{i:06d}.jpg", picture(colour, big, i))
                add(tar, f"{i:06d}.txt", f"a {'big' if big else 'small'} {colour} square".encode())
                add(tar, f"{i:06d}.json", json.dumps({"url": "x"}).encode())
    return folder


def conversation(i: int) -> dict:
    """Two questions about a picture, or a text-only exchange for each fifth."""
    if i % 5 == 4:
        turns = [("human", "what comes after monday ?"), ("gpt", "tuesday")]
        return {"id": f"t{i}", "source": "text", "conversations": [{"from": f, "value": v} for f, v in turns]}
    colour, big = sample(i)
    turns = [("human", "<image>\nwhat colour is it ?"), ("gpt", colour), ("human", "how big is it ?")]
    turns.append(("gpt", "big" if big else "small"))
    image = f"{i:06d}.jpg"
    return {"id": f"v{i}", "image": image, "conversations": [{"from": f, "value": v} for f, v in turns]}


def write_mixed(folder: Path, num: int) -> Path:
    """One shard as mixed: key.json with conversations, key.jpg where there is an image."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for i in range(num):
            record = conversation(i)
            if "image" in record:
                add(tar, f"{i:06d}.jpg", picture(*sample(i), i))
            add(tar, f"{i:06d}.json", json.dumps(record).encode())
    return folder


def write_json(folder: Path, num: int) -> Path:
    """The same as a LLaVA JSON with an image folder; returns the JSON."""
    (folder / "images").mkdir(parents=True)
    records = [conversation(i) for i in range(num)]
    for i, record in enumerate(records):
        if "image" in record:
            (folder / "images" / record["image"]).write_bytes(picture(*sample(i), i))
    (folder / "data.json").write_text(json.dumps(records, indent=1))
    return folder / "data.json"


def assert_serves_the_ids_of_training(processor, data: Path, encoder, num: int, max_length: int = 64) -> None:
    """What an exported processor makes of the first samples, rendered by its own template, is what was learnt from."""
    from train.data.chat import to_messages
    from train.data.prompts import parse
    from train.data.sources import decode_image, encode, open_source

    source = open_source(str(data))
    for index in range(num):
        record, encoded = encode(source, encoder, index, max_length)
        messages = to_messages(parse(record.conversations, len(record.images)))
        images = [decode_image(source.image_bytes(location)) for location in record.images]
        text = processor.apply_chat_template(messages)
        ids = processor(text=text, images=images or None, return_tensors="np", add_special_tokens=False)["input_ids"]
        assert ids[0].tolist() == encoded.ids.tolist()
        answers = sum(message["role"] == "assistant" for message in messages)
        assert (encoded.labels == encoder.end_id).sum() == answers
