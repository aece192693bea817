"""`align` and `finetune`: compose the model, measure the data, train, and write the run's directory."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from train.config import ADDED, Config, Model, Stage, share_of
from train.data.batches import Collator, Plan
from train.data.chat import chat_template, to_messages
from train.data.encoder import Encoder
from train.data.holding_out import hold_out
from train.data.measuring import measure_once
from train.data.own_template import OwnTemplate, read_own_template
from train.data.prompts import OWN, Rejected, Template, get_template, parse
from train.data.record_source import RecordSource
from train.data.sources import Measured, Source, check_bad, losses, open_source
from train.data.workers import choose_workers, resolve
from train.dist import Runtime, leave_unless_failed
from train.errors import DataError, UsageError
from train.folder import (
    MANIFEST,
    MEASURED,
    absolute,
    digest_data,
    digest_file,
    finish,
    held,
    open_run,
    read_json,
    relative,
)
from train.model import attention
from train.model.compose import Composed, compose
from train.model.half import stay_half
from train.model.language import load_tokenizer, turning_point
from train.model.learn import fuse, prepare, recompute
from train.model.regional import compile_layers
from train.model.skip_unlabelled import skip_unlabelled
from train.model.tower import make_image_processor
from train.run import checkpoint, sharding
from train.run.announce import announce
from train.run.base import describe_base
from train.run.cache import cache_features
from train.run.closed_form import start_from_words
from train.run.loop import Training
from train.run.losses import SampleLosses
from train.run.memory import out_of_memory, size_pass
from train.run.validation import BATCH, Validation

StageName = Literal["align", "finetune"]
PARITY_SAMPLES = 32
DEFAULT_TEMPLATE = "vicuna"  # for a language model without one of its own
log = logging.getLogger("train")


def run_stage(
    stage_name: StageName,
    config: Config,
    data: str,
    out: Path,
    *,
    images: str | None = None,
    align: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run a stage from its start or its last checkpoint; return its manifest. A finished run is not run again.

    align: a finished align run whose projector is the starting point; None: a random projector.
    Raises: TrainError and its subclasses.
    """
    stage: Stage = getattr(config, stage_name)
    runtime = Runtime.detect(stage.precision, choose_workers(stage.workers, gpu=torch.cuda.is_available()))
    with ExitStack() as stack:
        stack.push(leave_unless_failed)
        source = open_source(data, images, digest=runtime.rank == 0, runtime=runtime)
        if not config.model.template:  # the manifest records the one chosen
            name = template_name(config.model, load_tokenizer(config.model))
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, template=name))
        request = _request(stage_name, config, stage, data, images, align, out)
        if source.images_digest:
            request["inputs"]["images_digest"] = source.images_digest
        status = _claim(runtime, out, request, overwrite, stack)
        if status == "finished":
            log.info("%s is finished; nothing to do (--overwrite starts over)", out)
            return read_json(out / MANIFEST)
        log.info("%s on %s", stage_name, runtime.reason)
        inputs = request["inputs"]
        data_digest = f"{inputs['digest']} {inputs.get('images_digest', '')}"
        training, learnt_from = _assemble(config, stage, stage_name, source, runtime, out, align, data_digest)
        training.run()
        chosen = _keep_best(training) if training.validation is not None else {}
        trained = checkpoint.collect(training.trainable, None, keep=runtime.rank == 0)[checkpoint.WEIGHTS]
        if runtime.rank == 0:
            result = _result(training, learnt_from) | chosen
            adapter = training.composed.model.peft_config["default"] if stage.tune == "lora" else None
            checkpoint.save_trained(out, trained, adapter)
            told = losses(source, training.skipped) + training.plan.measured.lost_turns
            result |= {"left_out": told} if told else {}
            _write_skipped(out, source, training.skipped)
            if training.sample_losses is not None:
                training.sample_losses.write(out / "losses", source)
            finish(out, request, result)
            for line in told:
                log.warning("left out: %s", line)
        runtime.barrier()
        return read_json(out / MANIFEST)


def load_options(run: Path) -> tuple[Model, Stage, StageName]:
    """Read the options of a finished run from its manifest.  Raises: UsageError."""
    request = read_json(run / MANIFEST).get("request", {})
    try:
        model = Model(**request["model"])
        stage = Stage(**{**request["stage"], "betas": tuple(request["stage"]["betas"])})
        stage_name = request["command"]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{run} is not the directory of an align or finetune run ({error})") from None
    tower, lm, tokenizer = (absolute(path, run) for path in (model.tower, model.lm, model.tokenizer))
    return dataclasses.replace(model, tower=tower, lm=lm, tokenizer=tokenizer), stage, stage_name


def template_name(model: Model, tokenizer: Any) -> str:
    """Return the name in `model.template`; by default that of the language model's own template, if it has one."""
    return model.template or (OWN if tokenizer.chat_template else DEFAULT_TEMPLATE)


def stage_template(model: Model, stage: Stage, tokenizer: Any) -> Template | OwnTemplate:
    """Return the conversation template of a stage.  Raises: UsageError."""
    name = stage.template or template_name(model, tokenizer)
    if name == OWN:
        return read_own_template(tokenizer)
    template = get_template(name)
    if template.name == "plain" and not stage.plain_eos:
        return dataclasses.replace(template, end_text="\n")
    return template


def make_encoder(composed: Composed, model: Model, stage: Stage) -> Encoder:
    """Return the encoder of a stage."""
    template = stage_template(model, stage, composed.tokenizer)
    tokens = composed.vision.tokens_per_image
    return Encoder(composed.tokenizer, template, composed.image_token, tokens, stage.message_trees)


def _request(
    stage_name: StageName,
    config: Config,
    stage: Stage,
    data: str,
    images: str | None,
    align: Path | None,
    out: Path,
) -> dict[str, Any]:
    model = _told(config.model)
    options = _told(stage)
    for key in ("tower", "lm", "tokenizer"):
        model[key] = relative(model[key], out)
    inputs = {"data": relative(data, out), "digest": digest_data(data)}
    if stage.val and not share_of(stage.val):
        if not Path(stage.val).exists():
            raise UsageError(f"--val {stage.val}: no such file or folder, and no share such as 0.02")
        options["val"], inputs["val_digest"] = relative(stage.val, out), digest_data(stage.val)
    if images:
        inputs["images"] = relative(images, out)
    if align is not None:
        inputs["align"] = relative(str(align), out)
        if (align / MANIFEST).is_file():
            inputs["align_digest"] = digest_file(align / MANIFEST)
    return {"command": stage_name, "model": model, "stage": options, "inputs": inputs}


def _told(options: Model | Stage) -> dict[str, Any]:
    """Return options as a manifest holds them: without those of ADDED that have their default."""
    default = type(options)
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in ADDED or v != getattr(default, k)}


def _claim(runtime: Runtime, out: Path, request: dict[str, Any], overwrite: bool, stack: ExitStack) -> str:
    """Lock the directory in the first rank until the stack closes; return its status, or raise its error, in all."""

    def claim() -> str:
        stack.enter_context(held(out))
        return open_run(out, request, overwrite=overwrite)

    return str(runtime.first(claim))


def _assemble(
    config: Config,
    stage: Stage,
    stage_name: StageName,
    source: Source,
    runtime: Runtime,
    out: Path,
    align: Path | None,
    data_digest: str,
) -> tuple[Training, str]:
    if align is not None and stage.start:
        raise UsageError(
            f'{stage_name}.start = "{stage.start}" and --align {align}: the projector starts from only one of them'
        )
    if stage.shard and runtime.world > 1:
        composed = sharding.compose_once(runtime, lambda: compose(config.model, runtime.dtype))
    else:
        composed = compose(config.model, runtime.dtype)
    learnt_from = "" if align is None else _load_align(composed, config.model, align)
    if stage_name == "finetune" and align is None and not stage.start:
        log.info("without --align the projector starts from random weights")
    encoder = make_encoder(composed, config.model, stage)
    check_parity(source, encoder)
    max_length = config.model.max_length
    if stage.packing and not composed.can_pack:  # compose has logged why
        stage = dataclasses.replace(stage, packing=False)
    if stage.message_trees and (against := composed.against_trees(max_length)):
        raise UsageError(f"{stage_name}.message_trees: {against}")
    measured = measure_once(source, encoder, max_length, out.resolve().parent / MEASURED, runtime, data_digest)
    check_bad(source, measured.reasons, stage.max_bad_share)
    held_source, held = source, None
    if share := share_of(stage.val):
        measured, held = hold_out(source, measured, share, stage.seed, runtime)
    elif stage.val:
        held_source, held = _measure_held(stage, source, encoder, max_length, out, runtime)
    if stage.packing and config.model.attention == attention.NAME:
        log.info("%s", attention.describe(runtime.device, runtime.dtype))
    trainable = prepare(composed, stage)
    stage = dataclasses.replace(stage, micro_tokens=_size_pass(composed, config.model, stage, runtime, out))
    longest = max(int(part.lengths.max(initial=0)) for part in (measured, held) if part is not None)
    far = turning_point(composed.model.config.text_config, longest)
    plan = Plan(measured, stage, far)
    stage = resolve(stage, plan, composed.vision.image_bytes, runtime.world, gpu=runtime.device.type == "cuda")
    skip_unlabelled(composed.model.model.language_model)
    stay_half(composed.model)
    fuse(composed.model)
    attention.avoid_cudnn()
    announce(measured, plan, trainable, composed, stage_name)
    if config.model.gradient_checkpointing:
        recompute(composed.model.model.language_model)
    with out_of_memory(stage):
        if stage.shard and runtime.world > 1:
            trainable = sharding.shard(composed, stage, runtime)
            log.info("the model is sharded over %d processes", runtime.world)
        composed.model.to(runtime.device)
    if config.model.compile:
        log.info("%d layers are compiled when they first run", compile_layers(composed, runtime.device))
    collator = Collator(source, encoder, make_image_processor(composed.vision), max_length)
    training = Training(composed, stage, trainable, plan, collator, runtime, out, dict(measured.reasons))
    training.base = describe_base(composed, encoder)
    training.sample_losses = SampleLosses(len(source)) if stage.losses else None
    if held is not None:
        once = dataclasses.replace(stage, steps=0, epochs=1.0, batch_size=BATCH)
        decoding = Collator(held_source, encoder, collator.image_processor, max_length)
        training.validation = Validation(Plan(held, once, far), decoding, runtime)
        log.info("%d samples are held out; their loss is measured at each checkpoint", len(held.usable))
    with out_of_memory(stage):
        training.features = cache_features(composed, stage, plan, collator, runtime, training.skipped)
        if stage.start and runtime.first(lambda: checkpoint.latest(out / "checkpoints") is None):
            start_from_words(training)
    return training, learnt_from


def _measure_held(
    stage: Stage, source: Source, encoder: Encoder, max_length: int, out: Path, runtime: Runtime
) -> tuple[Source, Measured]:
    """Open and measure the held-out data; a JSON's images are where the run's own JSON's are, or beside it."""
    images = None
    if isinstance(source, RecordSource) and source.images and Path(stage.val).suffix in (".json", ".jsonl"):
        images = str(source.images)
    held = open_source(stage.val, images, digest=runtime.rank == 0, runtime=runtime)
    digest = f"{digest_data(stage.val)} {held.images_digest}"
    measured = measure_once(held, encoder, max_length, out.resolve().parent / MEASURED, runtime, digest)
    check_bad(held, measured.reasons, stage.max_bad_share)
    return held, measured


def _keep_best(training: Training) -> dict[str, Any]:
    """Restore the weights of the lowest validation loss and say which they are; a collective."""
    training.runtime.barrier()  # until the first rank has written them
    step, loss = checkpoint.restore_best(training.out / "checkpoints", training.trainable)
    log.info("keeping the weights after step %d, whose validation loss %.4f is the lowest", step, loss)
    return {"best_step": step, "val_loss": loss}


def _size_pass(composed: Composed, model: Model, stage: Stage, runtime: Runtime, out: Path) -> int:
    """Choose the tokens of a pass, the most that every rank can take, and log it if the default does not fit."""
    automatic = stage.micro_tokens == Stage.micro_tokens
    known = int(runtime.first(lambda: checkpoint.pass_size(out / "checkpoints"))) if automatic else 0
    how: dict[str, Any] = {"checkpointing": model.gradient_checkpointing, "world": runtime.world}
    size = size_pass(composed.model, stage, runtime.device, runtime.dtype, **how)
    size = int(min(runtime.gather(size)))
    if known and known != size and known < 2 * size:  # a larger one would not fit even after halving once
        log.info("passes of at most %s tokens, as before the checkpoint", f"{known:,}")
        return known
    if size < stage.micro_tokens:
        log.info("passes of at most %s tokens: what the GPU's free memory holds (micro_tokens)", f"{size:,}")
    return size


def _load_align(composed: Composed, model: Model, align: Path) -> str:
    """Start from the projector of an align run, which must have been trained on features like these."""
    manifest = read_json(align / MANIFEST)
    if manifest.get("request", {}).get("command") != "align":
        raise UsageError(f"--align {align} is not an align run")
    fingerprint = manifest["result"]["fingerprint"]
    if fingerprint != composed.fingerprint:
        raise UsageError(f"--align {align} was trained with another tower or language model than [model] names")
    there, here = manifest["request"]["model"], _told(model)
    for key in ("feature_layer", "feature_strategy", "grid", "scales", "scale_features"):
        if there.get(key) != here.get(key):
            raise UsageError(f"--align {align} was trained with model.{key} = {there.get(key)!r}, not {here[key]!r}")
    trained = checkpoint.load_trained(align)
    with torch.no_grad():
        for key, tensor in trained.items():
            composed.model.get_parameter(key).copy_(tensor)
    return str(fingerprint)


def check_parity(source: Source, encoder: Encoder) -> None:
    """Check on the first samples that our token ids equal those of the exported chat template.

    Training encodes a conversation piece by piece; serving renders the template and tokenises the whole text.

    Raises: DataError naming a sample for which they differ.
    """
    template = chat_template(encoder)
    special = set(encoder.tokenizer.all_special_tokens)
    for index in range(min(PARITY_SAMPLES, len(source))):
        try:
            record = source.record(index)
            turns = parse(record.conversations, len(record.images))
            ours, _ = encoder.piece_ids(encoder.pieces(turns))
        except Rejected:
            continue
        own = encoder.template if isinstance(encoder.template, OwnTemplate) else None
        if own is not None and not own.is_plain(turns):
            continue
        if any(token in part for turn in turns for part in turn.parts if part for token in special):
            continue  # text that imitates a special token stays text in training, but becomes the token in serving
        said = {} if own is None else {"enable_thinking": own.thinking(turns)}
        text = encoder.tokenizer.apply_chat_template(to_messages(turns), chat_template=template, tokenize=False, **said)
        text = text.replace(encoder.image_token, encoder.image_token * encoder.tokens_per_image)
        theirs = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            raise DataError(
                f"{source.name(index)}: the tokenizer splits the whole text differently from its pieces, near "
                f"{encoder.tokenizer.decode(ours[max(0, at - 3) : at + 3])!r}; set another model.template"
            )


def _result(training: Training, learnt_from: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in (training.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tail = rows[-max(1, len(rows) // 10) :]
    return {
        "steps": training.plan.steps,
        "samples": len(training.plan.usable),
        "skipped": dict(sorted(Counter(training.skipped.values()).items())),
        "truncated": training.plan.measured.num_truncated,
        "thinking": training.plan.measured.num_thinking,
        "first_loss": rows[0]["loss"],
        "last_loss": round(sum(row["loss"] for row in tail) / len(tail), 6),
        "tokens": sum(row["tokens"] for row in rows),
        "supervised": sum(row["supervised"] for row in rows),
        "device": training.runtime.reason,
        "fingerprint": training.composed.fingerprint,
        "base": training.base,
        "trainable": sorted(training.trainable),
        "align_fingerprint": learnt_from,
    }


def _write_skipped(out: Path, source: Source, skipped: dict[int, str]) -> None:
    lines = [json.dumps({"sample": source.name(i), "reason": reason}) for i, reason in sorted(skipped.items())]
    (out / "skipped.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
