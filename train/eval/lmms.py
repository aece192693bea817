"""A model for lmms-eval (0.7 or later): an exported folder, or a finished run that is not exported yet.

    python -m lmms_eval --model data_curate --model_args pretrained=RUN/finetune --tasks pope --batch_size 16

lmms-eval finds it by the entry point `lmms_eval.models` of this package. Its own `--model llava_hf` reads an exported
folder as well, one question at a time; this one answers in batches, exactly as `python -m train eval` does.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from train.data.prompts import Turn
from train.errors import UsageError
from train.eval.generate import load_speaker

MAX_NEW_TOKENS = 128
log = logging.getLogger("train")


def manifest() -> ModelManifest:
    """Tell lmms-eval the model's name and class."""
    return ModelManifest("data_curate", chat_class_path="train.eval.lmms.Model")


class Model(lmms):  # type: ignore[misc]
    """Answers greedily; images and text in any order, no video, no likelihoods."""

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 1, dtype: str = "bf16", **ignored: Any) -> None:
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.batch_size = int(batch_size)
        self.scratch = tempfile.TemporaryDirectory(prefix="data_curate_")
        folder = Path(pretrained)
        if not (folder / "config.json").is_file():
            folder = self._export(folder, dtype)
        self.speaker = load_speaker(folder)
        self.device = self.speaker.device

    def _export(self, run: Path, dtype: str) -> Path:
        from train.publish.export import export

        if not (run / "manifest.json").is_file():
            raise UsageError(f"pretrained={run} is neither an exported model nor a finished align or finetune run")
        folder = Path(self.scratch.name) / "model"
        log.warning("%s is not exported; this evaluation uses a temporary copy in %s (%s)", run, dtype, folder)
        export(run, folder, dtype=dtype)
        return folder

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests, in their order; a batch holds equal settings, all with pictures or all without."""
        asked = [self._read(request) for request in requests]
        order = sorted(range(len(asked)), key=lambda n: (repr(asked[n][2]), bool(asked[n][1]), n))
        answers = [""] * len(asked)
        start = 0
        while start < len(order):
            alike = [n for n in order[start : start + self.batch_size] if self._alike(asked[order[start]], asked[n])]
            settings = asked[alike[0]][2]
            texts = self.speaker.answers(
                [asked[n][0] for n in alike], [asked[n][1] for n in alike], settings["max_new_tokens"]
            )
            for n, text in zip(alike, texts, strict=True):
                for stop in settings["until"]:
                    text = text.split(stop)[0]
                answers[n] = text
                self.cache_hook.add_partial("generate_until", (requests[n].args[0], settings), text)
            start += len(alike)
        return answers

    @staticmethod
    def _alike(first: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        return bool(first[2] == other[2] and bool(first[1]) == bool(other[1]))

    def _read(self, request: Any) -> tuple[list[Turn], list[Any], dict[str, Any]]:
        """Read a request as turns, PIL images and settings."""
        _, to_messages, given, number, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number])).messages
        turns, images = [], []
        for message in messages:
            parts: list[str | None] = []
            for part in message.content:
                if part.type not in ("text", "image"):
                    raise UsageError(f"{task} asks about {part.type}; data_curate reads only images and text")
                parts.append(part.text if part.type == "text" else None)
                images += [] if part.type == "text" else [part.url.convert("RGB")]
            turns.append(Turn(message.role, tuple(parts)))
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        settings = {
            "max_new_tokens": int(given.get("max_new_tokens", MAX_NEW_TOKENS)),
            "until": [s for s in stops if s],
        }
        return turns, images, settings

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks that ask for likelihoods."""
        raise NotImplementedError("data_curate supports generate_until only, not likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse multi-round tasks."""
        raise NotImplementedError("data_curate supports questions of one round only")
