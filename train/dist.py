"""What a process of a run knows about itself and the others: device, precision, rank, sums, signals.

Under torchrun each process (a rank, 0 to world - 1) holds one device. `Runtime.detect` chooses device and precision and
joins the group of all ranks; its other methods are the only collectives outside of FSDP. Gradients are summed in flat
buckets of 64 M elements, so that many small tensors cost few messages and the copy of them stays small.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.processor import bf16_instructions, cores, gpu_has_bf16
from train.errors import UsageError

WAIT = timedelta(hours=2)  # for objects and barriers: one rank may read millions of samples, or write to a slow disk
STEP = timedelta(minutes=30)  # for numbers within a step: one rank may wait for its loader
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # where users set how torch allocates GPU memory
BUCKET = 1 << 26  # elements of gradients in one message


def ranks_here() -> int:
    """Count the ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def cores_of_a_rank() -> int:
    """Count the cores that this process may use, shared with the other ranks of its machine."""
    return max(1, cores() // ranks_here())


def _no_gpu(cuda: bool) -> str:
    """Say why `auto` computes in fp32, and what a processor with bf16 instructions would gain from bf16."""
    kind = bf16_instructions()
    if cuda or not kind:
        return "no GPU with bf16"
    # SmolLM2-135M, LoRA, avx512_bf16, two steps: 357 and 392 tokens/s for 186 and 217 (pipelines/LOG.md, 2026-11-28).
    return f"no GPU; with {kind}, precision = bf16 makes a language model of 100M or more nearly twice as fast"


def _own_device() -> torch.device:
    """Return this rank's GPU, or the processor.  Raises: UsageError if the machine has more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= seen:
        raise UsageError(
            f"rank {local} of this machine has no GPU: only {seen} visible; type torchrun --nproc-per-node {seen}"
        )
    return torch.device("cuda", local)


@dataclass(frozen=True)
class Runtime:
    """Device, precision and rank of this process; frozen for the length of a run."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and of frozen weights
    rank: int
    world: int  # number of ranks
    reason: str  # device and precision in words, with why they were chosen
    patient: Any = None  # the group of all ranks for objects and barriers, with a long time limit
    hosts: Any = None  # the group for numbers on the host: waits for no device, and has a shorter limit

    @classmethod
    def detect(cls, precision: str, workers: int) -> Self:
        """Choose device, precision and threads, and join the other processes where torchrun started several.

        Raises: UsageError for a rank without a GPU where others have one.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        device = _own_device()
        cuda = device.type == "cuda"
        if cuda:
            # Passes differ in shape: blocks of fixed size would leave gaps that no later pass fits into.
            if not any(name in os.environ for name in ALLOCATOR):
                os.environ[ALLOCATOR[0]] = "expandable_segments:True"  # read when the device is first used
            torch.cuda.set_device(device)
        if not cuda and "OMP_NUM_THREADS" not in os.environ:
            # A thread whose core is busy decoding holds up the whole matrix product: measured 4 times slower.
            torch.set_num_threads(max(1, cores_of_a_rank() - workers))
        patient, hosts = _join(device) if world > 1 else (None, None)
        native = cuda and gpu_has_bf16()
        bf16 = precision == "bf16" or (precision == "auto" and native)
        why = f"{precision} was asked for" if precision != "auto" else "the GPU has it" if bf16 else _no_gpu(cuda)
        card = f" {torch.cuda.get_device_name(device)}" if cuda else ""
        reason = f"{device}{card}, {'bf16 with fp32 masters' if bf16 else 'fp32'} ({why}), {world} process(es)"
        found = cls(device, torch.bfloat16 if bf16 else torch.float32, rank, world, reason, patient, hosts)
        found.forget_peak_memory()  # of earlier commands of this process
        return found

    @classmethod
    def for_inference(cls) -> Self:
        """Choose the device, and join the other ranks where torchrun started several; threads stay as they are."""
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        device = _own_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        groups = _join(device) if world > 1 else (None, None)
        return cls(device, torch.float32, rank, world, f"{device}, {world} process(es)", *groups)

    def autocast(self) -> Any:
        """Return the context of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()

    def forget_peak_memory(self) -> None:
        """Reset the memory peak to what is held now, if the system can."""
        if self.device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self.device)
        with suppress(OSError):  # only on Linux
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory_gb(self) -> float:
        """Return the most memory held since that reset: by the GPU's tensors, or else by this process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device) / 1e9)
        import resource
        import sys

        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return held / 1e9 * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS, KiB elsewhere

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sum each number over all ranks, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.hosts)
        return [float(x) for x in tensor]

    @property
    def place(self) -> tuple[int, int, int]:
        """The number of this machine, this rank's number on it, and its number of ranks, as torchrun sets them."""
        if self.world == 1:
            return 0, 0, 1
        node, local = int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        return node, local, ranks_here()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier(self.patient)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's object, in rank order; it is pickled on the way."""
        everyone: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, value, group=self.patient)
        return everyone

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's object in every rank; it is pickled on the way."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def share_here(self, function: Callable[[int, int], dict[Any, Any]]) -> dict[Any, Any]:
        """Call function(rank on this machine, ranks on this machine) in every rank; merge what it returns.

        Each rank gets the results of the ranks on its own machine.  Raises: in all ranks, what it raised in any.
        """
        node, local, count = self.place
        answer: list[Any] = [node, {}, None]
        try:
            answer[1] = function(local, count)
        except Exception as error:  # whatever it is, the others must not wait for it
            answer[2] = error
        everyone = self.gather(answer)
        if failed := [raised for _, _, raised in everyone if raised is not None]:
            raise failed[0]
        return {name: value for its, found, _ in everyone if its == node for name, value in found.items()}

    def first(self, function: Callable[[], Any]) -> Any:
        """Call a function in the first rank alone; return its result, or raise its error, in every rank."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer = [function(), None]
            except Exception as error:  # whatever it is, the others must not wait for it
                answer = [None, error]
        answer = self.broadcast(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def _join(device: torch.device) -> tuple[Any, Any]:
    """Join the group of all ranks, with torch's own time limit; return two groups over the host, of a long and a short.

    So a rank that fails in mid-step is noticed within minutes, yet the others may wait hours for one to read data.
    """
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.new_group(backend="gloo", timeout=WAIT), dist.new_group(backend="gloo", timeout=STEP)


def leave_unless_failed(failed: type[BaseException] | None, *_: object) -> None:
    """Leave the groups at the end of a block, unless this rank failed on NCCL, whose communicators only end together.

    There it would wait for the others while they wait for it, and the error would never be printed.
    """
    if failed is None or not in_nccl():
        leave_group()


def in_nccl() -> bool:
    """Return whether this process belongs to a group on GPUs."""
    return bool(dist.is_initialized() and dist.get_backend() == "nccl")


def leave_group() -> None:
    """Leave the groups that this process joined, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Note SIGTERM and SIGINT, so that the step in progress can end and be saved."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        def note(_number: int, _frame: FrameType | None) -> None:
            self.received = True

        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def sum_gradients(gradients: Iterable[Tensor]) -> None:
    """Sum gradients over all ranks in place, a bucket of at most BUCKET elements (or one larger tensor) at a time."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            _sum_bucket(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
