"""Our step beside that of the published scripts, on the same model, samples and machine: `python -m train bench`.

The reference keeps their semantics in this very harness: micro-batches of 8 samples in order, padded to the longest;
logits, in fp32, at every position; activations of the language model recomputed; SDPA. Ours packs, takes logits where
there are labels, and recomputes nothing. Both see the same samples step by step without dropout, so their losses must
agree, and are printed. Only ratios of one run mean anything; on a busy machine, those of CPU seconds. Without --config
it is a small Phi and CLIP whose parts have the shares of Phi-2's and CLIP-L's arithmetic, with images of 144 tokens and
texts a quarter as long.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train import workload
from train.batches import Batch, Collator, Plan, Rows
from train.config import Config, Model, Stage
from train.data import open_source
from train.loop import Training, out_of_memory
from train.measuring import measure
from train.model import compose, hidden_states, prepare, tower_features
from train.place import Place
from train.stages import make_encoder
from train.tower import make_image_processor

MICRO_BATCH = 8  # per device in Bunny's scripts, in both stages
LAYERS, WIDTH, HEADS, VOCABULARY = 6, 256, 4, 1024  # the head is 5 % of a pass, as Phi-2's
TOWER_LAYERS, TOWER_WIDTH = 3, 160  # 12 % of a pass, as CLIP-L/336's beside Phi-2
SMALL_PASS = 2048  # tokens; what a processor's cache likes
Kind = Literal["reference", "ours"]
log = logging.getLogger("train")


class Padded(Plan):
    """Samples in their order, a few at a time."""

    def micro_batches(self, step: int, world: int) -> list[Rows]:
        """Return micro-batches of rows of one sample."""
        samples = self.samples(step)
        groups = [[[i] for i in samples[at : at + MICRO_BATCH]] for at in range(0, len(samples), MICRO_BATCH)]
        return groups + [[] for _ in range(-len(groups) % world)]


class Reference(Training):
    """The published step: logits at every position."""

    def token_losses(self, batch: Batch) -> Tensor:
        """Return the loss f32 [s] of each supervised position."""
        feats = None
        if batch.pixels_nchw is not None:
            feats = tower_features(self.composed, batch.pixels_nchw, tuned=self.stage.tune_tower)
        hidden = hidden_states(self.composed, batch.ids_bl, batch.positions_bl, feats)
        logits = self.composed.model.lm_head(hidden).float().flatten(0, 1)
        targets = torch.full(logits.shape[:1], -100, device=logits.device)
        targets[batch.supervised_s] = batch.targets_s
        return nn.functional.cross_entropy(logits, targets, reduction="none")[batch.supervised_s]


def bench(config: Config | None, steps: int, batch_size: int) -> dict[str, Any]:
    """Run both stages both ways; return speeds, losses and their ratios.

    config: whose model (with fresh weights) and stages are run; None: the small model.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = config or Config(model=small_model(folder))
        model = dataclasses.replace(
            given.model,
            tokenizer=str(workload.tokenizer(folder / "tokenizer")),
            tower_weights="fresh",
            lm_weights="fresh",
        )
        stages: dict[str, Any] = {}
        for stage_name, write in (("align", workload.write_captions), ("finetune", workload.write_instructions)):
            stage: Stage = getattr(given, stage_name)
            size = batch_size or (stage.batch_size if config else 32)
            stage = dataclasses.replace(
                stage, steps=steps, batch_size=size, lora_dropout=0.0, save_every=steps, clip=1.0
            )
            if config is None:
                stage = dataclasses.replace(stage, lora_rank=16, lora_alpha=32, micro_tokens=SMALL_PASS)
            runs: dict[Kind, dict[str, Any]] = {}
            for kind in ("reference", "ours"):
                out = folder / stage_name / kind
                runs[kind] = _run(kind, stage_name, model, stage, write, folder / f"{stage_name}-data", out)
                log.info("%s %s: %s", stage_name, kind, _line(runs[kind]))
            stages[stage_name] = compare(runs)
        return {"model": _describe(given.model if config else None), "steps": steps, "stages": stages}


def small_model(folder: Path) -> Model:
    """Write the configurations of the small model."""
    from transformers import CLIPVisionConfig, PhiConfig

    CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=TOWER_LAYERS + 1,  # features are taken before the last
        num_attention_heads=4,
        image_size=168,
        patch_size=14,
    ).save_pretrained(folder / "tower")
    PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    ).save_pretrained(folder / "lm")
    return Model(tower=str(folder / "tower"), lm=str(folder / "lm"), template="bunny", image="pad", max_length=512)


def _run(kind: Kind, stage_name: str, model: Model, stage: Stage, write: Any, data: Path, out: Path) -> dict[str, Any]:
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (its import is nobody's step)

    place = Place.find(stage.precision, stage.workers)
    if kind == "reference":
        model = dataclasses.replace(model, attention="sdpa")
        stage = dataclasses.replace(stage, packing=False)
    composed = compose(model, place.dtype)
    encoder = make_encoder(composed, model, stage)
    if not data.is_dir():
        write(data, stage.steps * stage.batch_size, composed.vision.tokens_per_image)
    source = open_source(str(data / "data.json"))
    measured = measure(source, encoder, model.max_length)
    trainable = prepare(composed, stage)
    if kind == "reference":
        composed.model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        composed.model.model.language_model.train()
    with out_of_memory(stage):
        composed.model.to(place.device)
    collator = Collator(source, encoder, make_image_processor(composed.vision), model.max_length)
    plan = (Padded if kind == "reference" else Plan)(measured, stage)
    out.mkdir(parents=True)
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    work = Reference if kind == "reference" else Training
    began = time.process_time()
    work(composed, stage, trainable, plan, collator, place, out, dict(measured.reasons)).run()
    cpu_s = time.process_time() - began
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = measured.lengths[measured.usable]
    return {
        **summarise(rows),
        "cpu_s": cpu_s,
        "lengths": [int(x) for x in _quantiles(lengths)],
        "samples": len(lengths),
    }


def summarise(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Sum up a run's metrics; its first step, in which workers start and memory is found, counts only for the loss."""
    timed = rows[1:] or rows
    seconds = sum(row["step_s"] for row in timed)
    found = {
        "supervised_per_s": sum(row["supervised"] for row in timed) / seconds,
        "tokens_per_s": sum(row["tokens"] for row in timed) / seconds,
        "padding": sum(row["padding"] for row in timed) / len(timed),
        "data_wait": sum(row["data_wait_s"] for row in timed) / seconds,
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
        "losses": [row["loss"] for row in rows],
    }
    if "mfu" in rows[-1]:
        found["mfu"] = sum(row["mfu"] * row["step_s"] for row in timed) / seconds
    return found


def compare(runs: dict[Kind, dict[str, Any]]) -> dict[str, Any]:
    """Set ours beside the reference."""
    reference, ours = runs["reference"], runs["ours"]
    pairs = zip(reference["losses"], ours["losses"], strict=True)
    return {
        "reference": reference,
        "ours": ours,
        "speedup": ours["supervised_per_s"] / reference["supervised_per_s"],
        "speedup_cpu": reference["cpu_s"] / ours["cpu_s"],
        "loss_difference": max(abs(a - b) for a, b in pairs),
    }


def table(result: dict[str, Any]) -> str:
    """Write a result as a table."""
    head = (
        "stage",
        "supervised/s",
        "reference",
        "speedup",
        "in CPU s",
        "padding",
        "reference",
        "wait",
        "loss",
        "difference",
    )
    lines = [head]
    for name, stage in result["stages"].items():
        ours, reference = stage["ours"], stage["reference"]
        lines.append(
            (
                name,
                *(f"{run['supervised_per_s']:,.0f}" for run in (ours, reference)),
                *(f"{stage[key]:.2f}x" for key in ("speedup", "speedup_cpu")),
                *(f"{run['padding']:.0%}" for run in (ours, reference)),
                f"{ours['data_wait']:.1%}",
                f"{ours['losses'][-1]:.5f}",
                f"{stage['loss_difference']:.1e}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _quantiles(lengths: Any) -> Any:
    import numpy as np

    return np.quantile(lengths, (0.05, 0.25, 0.5, 0.75, 0.95))


def _line(run: dict[str, Any]) -> str:
    return f"{run['supervised_per_s']:,.0f} supervised tokens/s, {run['padding']:.0%} padding"


def _describe(model: Model | None) -> str:
    if model is None:
        return (
            f"Phi {LAYERS} x {WIDTH}, CLIP {TOWER_LAYERS} x {TOWER_WIDTH}, 144 tokens an image, texts a quarter as long"
        )
    return f"{model.tower} + {model.lm}, fresh weights"
