"""What is promised of every family and every tower, at toy size, as one check that tests share."""

import torch
import transformers as tf
from toys import word_tokenizer

from train.config import Stage
from train.model.compose import compose
from train.model.forward import hidden_states, token_losses, tower_features
from train.model.learn import prepare
from train.model.native import load_native
from train.model.skip_unlabelled import skip_unlabelled
from train.publish.export import merge_trained, write_folder
from train.run.stage import make_encoder


def write_lm(config, folder):
    """Write a language model of a configuration with weights that all matter, and its tokenizer."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def write_timm(name, arguments, folder, side=64):
    """Write a network with weights that all matter as timm writes it; convolutional ones for small images."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if "img_size" not in arguments:
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return str(folder)


def states(composed, texts, feats, packed):
    """The hidden states of documents, in one row or each by itself."""
    rows = [texts] if packed else [[text] for text in texts]
    out = []
    for row, picture in zip(rows, [feats] if packed else feats.split(1), strict=True):
        lengths = [len(text) for text in row]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        out.append(hidden_states(composed, torch.cat(row)[None], positions, picture, lengths if packed else ()))
    return torch.cat(out, 1)[0]


def learns_and_returns(options, folder):
    """Check packed = alone, LoRA learns, the export loads with equal logits; return whether it packs."""
    composed, stage = compose(options), Stage(tune="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.0)
    side, image = composed.vision.image_size, [composed.image_id] * composed.vision.tokens_per_image
    pixels = torch.randint(0, 255, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    feats = tower_features(composed, pixels)
    texts = [torch.tensor([5, *image, *range(6, 13)]), torch.tensor([*image, 20, 21, 7, 30, 31])]
    with torch.no_grad():
        alone = states(composed, texts, feats, packed=False)
        if composed.can_pack:
            largest = float(alone.abs().max())
            torch.testing.assert_close(states(composed, texts, feats, packed=True), alone, rtol=0, atol=1e-5 * largest)

    trainable = prepare(composed, stage)
    skip_unlabelled(composed.model.model.language_model)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(2):  # LoRA's first factor has no gradient before its second has moved
        optimizer.zero_grad()
        hidden = states(composed, texts, feats, packed=composed.can_pack)
        token_losses(composed.model, hidden[[8, 9, -2]], torch.tensor([9, 10, 31])).sum().backward()
        optimizer.step()
    moved = [name for name, p in trainable.items() if "lora_B" in name and p.grad is not None and p.grad.any()]
    assert moved and all(torch.isfinite(p).all() for p in trainable.values())

    again = compose(options)
    assert again.fingerprint == composed.fingerprint
    merge_trained(again.model, {name: p.detach() for name, p in trainable.items()}, 2.0)
    folder.mkdir()
    write_folder(again, make_encoder(again, options, stage), folder, torch.float32)
    native = load_native(folder, torch.float32)[0].eval()
    composed.model.eval()
    with torch.no_grad():
        ours = composed.model.lm_head(states(composed, texts, feats, packed=False))
        shown = {"pixel_values": ((pixels.float() / 255) - torch.tensor(composed.vision.mean).view(1, 3, 1, 1))}
        shown["pixel_values"] /= torch.tensor(composed.vision.std).view(1, 3, 1, 1)
        theirs = [
            native(input_ids=text[None], pixel_values=shown["pixel_values"][i : i + 1]).logits[0]
            for i, text in enumerate(texts)
        ]
    torch.testing.assert_close(torch.cat(theirs), ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
    return composed.can_pack
