"""Compare our step with that of the published scripts, on one model, data and machine: `python -m train bench`.

The reference has their semantics in this same harness: micro-batches of 8 samples in order, padded to the longest, with
a mask for the padding; logits, in fp32, at every position; activations of the language model recomputed; SDPA;
transformers' own modules. As in their code the tower runs without a graph, for the whole micro-batch at once. Left out
in their favour: Bunny's tower also runs its last block and its pooling head, and sees a blank image for a text sample.

Ours packs, computes logits and the end of the last layer only at labels, and recomputes nothing. Both see the same
samples step by step without dropout, so their losses must agree, and are printed. Only ratios within one run are
meaningful; on a busy machine, those of CPU seconds. `arithmetic` is the ratio of the operations that both need: the
speedup on a machine that does nothing but arithmetic.

Without --config the two alternate, step by step, on a small Phi and SigLIP whose parts have the same shares of the
arithmetic as in Phi-2 and SigLIP-SO400M, with images of 144 tokens and texts a quarter as long; the arithmetic of those
two at full size is printed as well.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from train.bench import workload
from train.bench.quick_draws import quick_draws
from train.config import Config, Model, Stage
from train.data.batches import Batch, Collator, Passes, Plan, Rows
from train.data.measuring import measure
from train.data.sources import open_source
from train.data.workers import choose_workers, resolve
from train.dist import Runtime
from train.errors import UsageError
from train.model import attention
from train.model.compose import Composed, blueprint, compose
from train.model.forward import embeddings, tower_features
from train.model.half import stay_half
from train.model.language import load_tokenizer, read_lm_config
from train.model.learn import fuse, prepare, recompute
from train.model.regional import compile_layers
from train.model.skip_unlabelled import skip_unlabelled
from train.model.tower import make_image_processor
from train.run.flops import Cost, published
from train.run.loop import Training
from train.run.memory import out_of_memory, size_pass
from train.run.stage import make_encoder

LOADING_S = 5.0  # the loader's own pace is measured for at most this long
MICRO_BATCH = 8  # per device in Bunny's scripts, in both stages
LAYERS, WIDTH, HEADS, VOCABULARY = 24, 192, 3, 2816  # the head is 5 % of a forward pass, as Phi-2's
TOWER_LAYERS, TOWER_WIDTH, TOWER_HEADS = 7, 144, 2  # 17 % of the language model's forward pass, as SigLIP's
SMALL_PASS, SMALL_RANK = 2048, 10  # tokens, to fit a processor's cache; LoRA is 8 % of a layer, as 128 is of Phi-2's
TOWER, LM = "google/siglip-so400m-patch14-384", "microsoft/phi-2"  # the pair that the small model stands for
Kind = Literal["reference", "ours"]
WRITERS = {"align": workload.write_captions, "finetune": workload.write_instructions}
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

    def token_losses(self, batch: Batch, zero: Tensor | float = 0.0) -> Tensor:
        """Return the loss f32 [s] of each supervised position."""
        feats = None
        if batch.pixels_nchw is not None:
            feats = tower_features(self.composed, batch.pixels_nchw, tuned=self.stage.tune_tower)
        lengths = torch.tensor(batch.lengths, device=batch.ids_bl.device)
        embeds = embeddings(self.composed, batch.ids_bl, feats) + zero
        if not embeds.requires_grad:  # only texts: the case for enable_input_require_grads
            embeds.requires_grad_()
        out = self.composed.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=batch.positions_bl < lengths[:, None],
            position_ids=batch.positions_bl,
            use_cache=False,
        )
        logits = self.composed.model.lm_head(out.last_hidden_state).float().flatten(0, 1)
        targets = torch.full(logits.shape[:1], -100, device=logits.device)
        targets[batch.supervised_s] = batch.targets_s
        return nn.functional.cross_entropy(logits, targets, reduction="none")[batch.supervised_s]


def bench(config: Config | None, steps: int, batch_size: int) -> dict[str, Any]:
    """Run both stages in both ways; return speeds, losses and their ratios.

    config: its model (with fresh weights) and stages are run; None: the small model.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given, model = _fresh(config, folder)
        stages: dict[str, Any] = {}
        for stage_name, write in WRITERS.items():
            stage = _shortened(given, stage_name, steps, batch_size, small=config is None)
            runs: dict[Kind, dict[str, Any]] = {}
            kinds: tuple[Kind, ...] = ("reference", "ours")
            both = [_run(kind, model, stage, write, folder / stage_name, runs) for kind in kinds]
            if config is None:
                both = [zip_longest(*both)]
            for run in both:
                for _ in run:
                    pass
            stages[stage_name] = compare(runs)
        return {"model": _describe(given.model if config else None), "steps": steps, "stages": stages}


def one_stage(
    config: Config, stage_name: str, kind: Kind, steps: int, batch_size: int, *, small: bool = False
) -> Iterator[dict[str, Any]]:
    """Run one stage in one way, as `bench` does; after every step yield what was measured so far.

    small: use the small model instead of the given one, with the given one's switches.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if small:
            switches = {key: getattr(config.model, key) for key in ("attention", "gradient_checkpointing", "compile")}
            config = dataclasses.replace(config, model=dataclasses.replace(small_model(folder), **switches))
        given, model = _fresh(config, folder)
        stage = _shortened(given, stage_name, steps, batch_size, small=small)
        runs: dict[Kind, dict[str, Any]] = {}
        for _ in _run(kind, model, stage, WRITERS[stage_name], folder / stage_name, runs):
            found = {**summarise(_metrics(folder / stage_name / kind)), **runs[kind]}
            computing_s = sum(found["step_s"]) * (1 - found["data_wait"])
            yield {**found, "taken_per_s": stage.batch_size * len(found["step_s"]) / computing_s}


def _fresh(config: Config | None, folder: Path) -> tuple[Config, Model]:
    """Resolve what to run: the given configuration or the small model's, and its model with fresh weights."""
    given = config or Config(model=small_model(folder))
    words = str(workload.tokenizer(folder / "tokenizer"))
    return given, dataclasses.replace(given.model, tokenizer=words, tower_weights="fresh", lm_weights="fresh")


def _shortened(given: Config, stage_name: str, steps: int, batch_size: int, *, small: bool) -> Stage:
    """Shorten a stage to this many steps, without dropout. batch_size 0: the stage's own; 16 for the small model."""
    stage: Stage = getattr(given, stage_name)
    size = batch_size or (16 if small else stage.batch_size)
    stage = dataclasses.replace(stage, steps=steps, batch_size=size, lora_dropout=0.0, save_every=steps, clip=1.0)
    if small:
        stage = dataclasses.replace(stage, lora_rank=SMALL_RANK, lora_alpha=20, micro_tokens=SMALL_PASS)
    return stage


def _metrics(out: Path) -> list[dict[str, float]]:
    """Read the metrics that a run has recorded."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def small_model(folder: Path) -> Model:
    """Write the configurations of the small model."""
    from transformers import PhiConfig, SiglipVisionConfig

    SiglipVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=round(4304 / 1152 * TOWER_WIDTH),
        num_hidden_layers=TOWER_LAYERS + 1,  # features are taken before the last
        num_attention_heads=TOWER_HEADS,
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


def _run(
    kind: Kind, model: Model, stage: Stage, write: Any, folder: Path, runs: dict[Kind, dict[str, Any]]
) -> Iterator[Any]:
    """Run one kind, yielding after each step; record at the end what was measured."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (so that no step pays for its import)

    runtime = Runtime.detect(stage.precision, choose_workers(stage.workers, gpu=torch.cuda.is_available()))
    if kind == "reference":
        model = dataclasses.replace(model, attention="sdpa")
        stage = dataclasses.replace(stage, packing=False, message_trees="")
    rows, needed = read_lm_config(model).vocab_size, len(load_tokenizer(model))
    if rows < needed:
        raise UsageError(f"{model.lm} has a vocabulary of {rows:,}; the bench's texts need {needed:,}")
    with quick_draws():
        composed = compose(model, runtime.dtype)
    encoder = make_encoder(composed, model, stage)
    if not (folder / "data").is_dir():
        write(folder / "data", stage.steps * stage.batch_size, composed.vision.tokens_per_image)
    source = open_source(str(folder / "data" / "data.json"))
    measured = measure(source, encoder, model.max_length)
    trainable, lm = prepare(composed, stage), composed.model.model.language_model
    if kind == "reference":
        # LLaVA's transformers 4.37.2 leaves the choice to torch 2.1.2, whose checkpoints run a whole layer again;
        # non-reentrant ones, the default since, stop before its last product.
        recompute(lm, reentrant=True)
    else:
        how: dict[str, Any] = {"checkpointing": model.gradient_checkpointing}
        tokens = size_pass(composed.model, stage, runtime.device, runtime.dtype, **how)
        stage = dataclasses.replace(stage, micro_tokens=tokens)
        skip_unlabelled(lm)
        stay_half(composed.model)
        fuse(composed.model)
        attention.avoid_cudnn()
        if model.gradient_checkpointing:
            recompute(lm)
    with out_of_memory(stage):
        composed.model.to(runtime.device)
    if kind == "ours" and model.compile:
        compile_layers(composed, runtime.device)
    collator = Collator(source, encoder, make_image_processor(composed.vision), model.max_length)
    plan = (Padded if kind == "reference" else Plan)(measured, stage)
    stage = resolve(stage, plan, composed.vision.image_bytes, runtime.world, gpu=runtime.device.type == "cuda")
    out = folder / kind
    out.mkdir(parents=True)
    runtime.forget_peak_memory()
    pace = loading_pace(Passes(plan, collator, runtime.rank, runtime.world), plan.steps, stage.num_workers)
    runs[kind] = {"micro_tokens": stage.micro_tokens, "loaded_per_s": pace}
    work = Reference if kind == "reference" else Training
    steps = work(composed, stage, trainable, plan, collator, runtime, out, dict(measured.reasons)).steps()
    cpu_s: list[float] = []
    began = time.process_time()
    while next(steps, None):
        cpu_s.append(time.process_time() - began)
        yield
        began = time.process_time()
    runs[kind] = {
        **runs[kind],
        **summarise(_metrics(out)),
        "cpu_s": sum(cpu_s[1:]),
        "lengths": [int(x) for x in np.quantile(measured.lengths[measured.usable], (0.05, 0.25, 0.5, 0.75, 0.95))],
        "samples": len(measured.usable),
        "operations": _operations(kind, composed, stage, plan),
    }
    log.info("%s: %.0f supervised tokens/s", kind, runs[kind]["supervised_per_s"])


def loading_pace(passes: Passes, steps: int, workers: int) -> float:
    """Return the samples per second that the loader delivers when it never has to wait for a step.

    `data_wait` of a few steps does not show it: while the first one starts up, each worker decodes PREFETCH passes
    ahead, which may be all of them, so that it reads 0 however slow they are. The first pass of each worker, which
    includes its start, is not counted.
    """
    coming = (batch for step in passes.steps(0, steps, workers, pin=False) for batch in step)
    for _ in islice(coming, max(1, workers)):
        pass
    began, samples = time.perf_counter(), 0
    for batch in coming:
        samples += len(batch.lengths)
        if time.perf_counter() - began > LOADING_S:
            break
    return samples / (time.perf_counter() - began)


def _operations(kind: Kind, composed: Composed, stage: Stage, plan: Plan) -> dict[str, dict[str, float]]:
    """Count what the steps must compute, on the model that runs and on the one it stands for if it is the small one."""
    passes = [rows for step in range(plan.steps) for rows in plan.micro_batches(step, 1)]
    count, padded = (published, True) if kind == "reference" else (Cost.of, False)
    here, vision = plan.measured, composed.vision
    found = {"here": count(composed, stage).parts(here, passes, padded=padded)}
    if stage.micro_tokens == SMALL_PASS:
        native, full = blueprint(Model(tower=TOWER, lm=LM))
        pair = dataclasses.replace(composed, model=native, vision=full, feature_index=26)
        stage = dataclasses.replace(stage, lora_rank=Stage.lora_rank)
        prepare(pair, stage)
        scale = workload.IMAGE_TOKENS / vision.tokens_per_image
        lengths = scale * (here.lengths - here.images * vision.tokens_per_image) + here.images * full.tokens_per_image
        supervised = np.rint(scale * here.supervised).astype(np.int32)
        long = dataclasses.replace(here, lengths=np.rint(lengths).astype(np.int32), supervised=supervised)
        found["full size"] = count(pair, stage).parts(long, passes, padded=padded)
    return found


def summarise(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Sum up a run's metrics; its first step, which starts workers and allocates memory, counts only for the loss."""
    timed = rows[1:] or rows
    seconds = sum(row["step_s"] for row in timed)
    found = {
        "supervised_per_s": sum(row["supervised"] for row in timed) / seconds,
        "tokens_per_s": sum(row["tokens"] for row in timed) / seconds,
        "padding": sum(row["padding"] for row in timed) / len(timed),
        "data_wait": sum(row["data_wait_s"] for row in timed) / seconds,
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
        "losses": [row["loss"] for row in rows],
        "step_s": [row["step_s"] for row in timed],
    }
    if "mfu" in rows[-1]:
        found["mfu"] = sum(row["mfu"] * row["step_s"] for row in timed) / seconds
    return found


def compare(runs: dict[Kind, dict[str, Any]]) -> dict[str, Any]:
    """Compare ours with the reference."""
    reference, ours = runs["reference"], runs["ours"]
    pairs = zip(reference["losses"], ours["losses"], strict=True)
    counts = {size: [sum(run["operations"][size].values()) for run in (reference, ours)] for size in ours["operations"]}
    return {
        "reference": reference,
        "ours": ours,
        "speedup": ours["supervised_per_s"] / reference["supervised_per_s"],
        "speedup_cpu": reference["cpu_s"] / ours["cpu_s"],
        "arithmetic": {size: there / here for size, (there, here) in counts.items()},
        "loss_difference": max(abs(a - b) for a, b in pairs),
    }


def table(result: dict[str, Any]) -> str:
    """Format a result as a table."""
    head = ["stage", "supervised/s", "reference", "speedup", "in CPU s", "arithmetic"]
    lines = [[*head, "padding", "reference", "wait", "loss", "difference"]]
    for name, stage in result["stages"].items():
        ours, reference = stage["ours"], stage["reference"]
        lines.append(
            [
                name,
                *(f"{run['supervised_per_s']:,.0f}" for run in (ours, reference)),
                *(f"{ratio:.2f}x" for ratio in (stage["speedup"], stage["speedup_cpu"], stage["arithmetic"]["here"])),
                *(f"{run['padding']:.0%}" for run in (ours, reference)),
                f"{ours['data_wait']:.1%}",
                f"{ours['losses'][-1]:.5f}",
                f"{stage['loss_difference']:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *_shares(result)])


def _shares(result: dict[str, Any]) -> list[str]:
    """List the parts' shares of the reference's arithmetic for both steps, and the ratios at full size."""
    lines = []
    for name, stage in result["stages"].items():
        for size, ratio in stage["arithmetic"].items():
            there = sum(stage["reference"]["operations"][size].values())
            for kind in ("reference", "ours"):
                parts = stage[kind]["operations"][size]
                shares = ", ".join(f"{part} {count / there:.1%}" for part, count in parts.items())
                lines.append(f"{name}, {size}, {kind}: {shares}" + (f": {ratio:.2f}x" if kind == "ours" else ""))
    return ["of the reference's arithmetic:", *lines]


def _describe(model: Model | None) -> str:
    if model is None:
        small = f"Phi {LAYERS} x {WIDTH}, SigLIP {TOWER_LAYERS} x {TOWER_WIDTH}, 144 tokens an image"
        return f"{small}, texts a quarter as long; full size: {LM} + {TOWER}"
    return f"{model.tower} + {model.lm}, fresh weights"
