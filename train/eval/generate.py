"""Ask an exported model about an image: one question, many in batches, or a conversation in the terminal.

Only transformers' own classes run the model: what works here works wherever llava-hf models are served.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.processor import bf16_instructions, gpu_has_bf16
from pipelines.records import IMAGE_MARK, split_at_marks
from train.data.chat import to_messages
from train.data.prompts import Rejected, Turn
from train.data.sources import decode_image
from train.errors import UsageError
from train.model import attention
from train.model.language import rotary_switch
from train.model.native import load_native

log = logging.getLogger("train")
LOGITS = 256  # positions at a time: a vocabulary of 262,144 in fp32 is 1 MiB for each


@dataclass(frozen=True)
class Speaker:
    """An exported model and its processor, on a device."""

    model: Any
    processor: Any
    device: torch.device

    def answers(
        self, turns: Sequence[Sequence[Turn]], images: Sequence[Sequence[Any]], max_new_tokens: int
    ) -> list[str]:
        """Answer conversations that end with a question, greedily, as one batch; images: PIL images by conversation.

        Conversations whose lengths need different rotary angles share no pass.
        """
        inputs = self._encode([self._write(conversation, open_ended=True) for conversation in turns], images)
        if len(groups := self._apart(inputs, max_new_tokens)) > 1:
            return _joined(groups, lambda at: self.answers(_at(turns, at), _at(images, at), max_new_tokens))
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        said = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.rpartition("</think>")[2].strip() for text in said]  # without the thinking before an answer

    def truth_losses(
        self, turns: Sequence[Sequence[Turn]], images: Sequence[Sequence[Any]], truths: Sequence[str]
    ) -> list[tuple[float, int]]:
        """Return for each conversation the summed cross-entropy of its true answer, end included, and its tokens."""
        answered = [[*c, Turn("assistant", (truth,))] for c, truth in zip(turns, truths, strict=True)]
        asked = self._encode([self._write(c, open_ended=True) for c in turns], images)["attention_mask"].sum(1)
        inputs = self._encode([self._write(c, open_ended=False) for c in answered], images)
        if len(groups := self._apart(inputs)) > 1:
            return _joined(groups, lambda at: self.truth_losses(_at(turns, at), _at(images, at), _at(truths, at)))
        ids = inputs["input_ids"]
        sizes = [int(n) for n in inputs["attention_mask"].sum(1) - asked]  # padded on the left: answers end together
        # ChatML and similar templates write a newline after the end token, which has no label.
        end = self.processor.tokenizer.eos_token_id
        found = [(row[-size:] == end).nonzero() for row, size in zip(ids, sizes, strict=True)]
        stops = [int(at[-1]) + 1 if len(at) else size for at, size in zip(found, sizes, strict=True)]
        spans = list(zip(sizes, stops, strict=True))
        with torch.inference_mode():
            hidden_btd = self.model.model(**inputs, use_cache=False).last_hidden_state
            before = torch.cat([own[-n - 1 : -1][:stop] for own, (n, stop) in zip(hidden_btd, spans, strict=True)])
            right = torch.cat([row[-n:][:stop] for row, (n, stop) in zip(ids, spans, strict=True)])
            losses = [
                torch.nn.functional.cross_entropy(self.model.lm_head(part).float(), truth, reduction="none").double()
                for part, truth in zip(torch.split(before, LOGITS), torch.split(right, LOGITS), strict=True)
            ]
        return [(float(own.sum()), len(own)) for own in torch.split(torch.cat(losses), stops)]

    def _apart(self, inputs: Any, more: int = 0) -> list[list[int]]:
        """Split the rows of a batch into groups that may share a pass.  more: tokens that each may still get."""
        lengths = inputs["attention_mask"].sum(1).tolist()
        kind, far = rotary_switch(self.model.config.text_config)
        near = [row for row, length in enumerate(lengths) if not far or length + more <= far]
        beyond = [row for row, length in enumerate(lengths) if far and length > far and kind == "longrope"]
        alone = [[row] for row in range(len(lengths)) if row not in {*near, *beyond}]  # may cross the limit
        return [group for group in (near, beyond, *alone) if group]

    def _write(self, turns: Sequence[Turn], *, open_ended: bool) -> str:
        """Write a conversation in the model's template; if it is open-ended, up to where the next answer begins.

        Text that imitates the image token gets a space; otherwise the processor would look for a picture.
        """
        token = self.processor.image_token
        spelt = f"{token[0]} {token[1:]}"
        said = [Turn(t.role, tuple(part and part.replace(token, spelt) for part in t.parts)) for t in turns]
        return str(self.processor.apply_chat_template(to_messages(said), add_generation_prompt=open_ended))

    def _encode(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
        """Encode conversations as one batch, padded on the left."""
        flat, bos = [list(own) for own in images], self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=list(texts),
            images=flat if any(flat) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        inputs.pop("token_type_ids", None)
        return inputs.to(self.device, dtype=self.model.dtype)


def _at(values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [values[row] for row in rows]


def _joined(groups: Sequence[Sequence[int]], work: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
    """Apply `work` to groups of rows, and return the results in the rows' order."""
    found: dict[int, Any] = {}
    for group in groups:
        found |= zip(group, work(group), strict=True)
    return [found[row] for row in range(len(found))]


def load_speaker(folder: Path, device: torch.device | None = None) -> Speaker:
    """Load an exported folder, by default on the GPU if there is one.  Raises: UsageError."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention.avoid_cudnn()  # each new token makes a new shape
    # The export's own precision if the device multiplies in it: other devices are slow in bf16.
    cuda = device.type == "cuda"
    model, processor = load_native(folder, "auto" if cuda or bf16_instructions() else torch.float32)
    if cuda and model.dtype == torch.bfloat16 and not gpu_has_bf16():
        model = model.float()
    processor.tokenizer.padding_side = "left"
    see_each_once(model.model.vision_tower)
    return Speaker(model.to(device).eval(), processor, device)


def see_each_once(tower: torch.nn.Module) -> None:
    """Make a tower compute consecutive equal images once: benchmarks ask several questions about a picture."""
    places: list[torch.Tensor] = []

    def before(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pixels_nchw = named["pixel_values"] if "pixel_values" in named else given[0]
        new = torch.ones(len(pixels_nchw), dtype=torch.bool, device=pixels_nchw.device)
        new[1:] = (pixels_nchw[1:] != pixels_nchw[:-1]).flatten(1).any(1)
        places.append(new.cumsum(0) - 1)
        return (), named | {"pixel_values": pixels_nchw[new]}

    def after(_: Any, __: Any, ___: Any, out: Any) -> Any:
        at = places.pop()
        for name, value in list(out.items()):
            if isinstance(value, tuple):
                out[name] = tuple(None if each is None else each[at] for each in value)
            else:
                out[name] = value[at]
        return out

    tower.register_forward_pre_hook(before, with_kwargs=True)
    tower.register_forward_hook(after, with_kwargs=True)


def read_image(path: str) -> Any:
    """Read an image file.  Raises: UsageError."""
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"--image {path}: {error.strerror}") from None
    except Rejected as reason:
        raise UsageError(f"--image {path} cannot be used ({reason})") from None


def ask(folder: Path, images: str | Sequence[str], prompt: str, max_new_tokens: int, system: str = "") -> str:
    """Answer one question, with or without images.

    images: a file, or several in order. Each `<image>` in the prompt stands for the next; without any, all come first.
    Raises: UsageError.
    """
    shown = [read_image(image) for image in ([images] if isinstance(images, str) else images)]
    turns = [Turn("system", (system,))] if system else []
    turns.append(Turn("user", _question(prompt, len(shown))))
    return load_speaker(folder).answers([turns], [shown], max_new_tokens)[0]


def chat(
    folder: Path,
    images: str | Sequence[str],
    questions: Iterator[str],
    say: Callable[[str], None],
    max_new_tokens: int,
    system: str = "",
) -> None:
    """Hold a conversation about images, which are shown with the first question, until the questions end."""
    shown = [read_image(image) for image in ([images] if isinstance(images, str) else images)]
    speaker = load_speaker(folder)
    turns = [Turn("system", (system,))] if system else []
    first = len(turns)
    for question in questions:
        turns.append(Turn("user", _question(question, len(shown) if len(turns) == first else 0)))
        answer = speaker.answers([turns], [shown], max_new_tokens)[0]
        turns.append(Turn("assistant", (answer,)))
        say(answer)


def _question(prompt: str, num_images: int) -> tuple[str | None, ...]:
    """Put images where a prompt's marks are, or first.  Raises: UsageError if marks and images differ in number."""
    marks = prompt.count(IMAGE_MARK) if num_images else 0
    if marks and marks != num_images:
        raise UsageError(f"the prompt has {marks} {IMAGE_MARK}, but {num_images} --image were given; give as many")
    if not marks:
        return (None,) * num_images + ((prompt,) if prompt else ())
    return split_at_marks(prompt)
