"""Processes, device, precision and random numbers of a run."""

import contextlib
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from harness.errors import UserError

def rank():
    """Number of this process, from 0, among those that torchrun started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together: 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Return when all processes have come to this place."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(x):
    """The sum over all processes of the tensor `x`, on the CPU."""
    if world_size() > 1:
        x = x.to("cuda") if dist.get_backend() == "nccl" else x
        dist.all_reduce(x)
    return x.cpu()


@contextlib.contextmanager
def processes(rung):
    """Within, the processes that torchrun started know each other, and the first of them talks. The first process of
    each machine makes the token files, if there are none, before it joins the others. Raises ValueError if they cannot
    work together."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    on_gpu, local_rank, n = rung["DEVICE"].startswith("cuda"), int(os.environ["LOCAL_RANK"]), os.environ["WORLD_SIZE"]
    if "rank" not in rung["get_batch"].__code__.co_names:  # every process would train on the same batches
        raise UserError(f"this rung trains in one process: python {Path(rung['__file__']).name}")
    if rung["BATCH_SIZE"] % int(n):
        raise UserError(f"BATCH_SIZE={rung['BATCH_SIZE']} must be a multiple of the {n} processes")
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if local_rank == 0 and rung["PROMPT"] is None:
        rung["load_tokens"](rung["VOCABULARY"], rung["DATA"])
    dist.init_process_group("nccl" if on_gpu else "gloo")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def share(model):
    """The model as several processes train it: each holds all of it and sees its own part of every batch, and
    DistributedDataParallel averages the gradients (Li et al. 2020, arXiv:2006.15704)."""
    return nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model


def sync_gradients(model, now):
    """Context of a forward and backward pass: `now` says whether the processes average their gradients in it, as they
    do in the last of several micro-batches."""
    return model.no_sync() if world_size() > 1 and not now else contextlib.nullcontext()


auto_dtypes = {}  # device: what DTYPE="auto" means there, decided once


def resolve_dtype(device, dtype):
    """Name of the type that matrix products use: `dtype`, or for "auto" the faster of float32 and bfloat16."""
    if dtype != "auto":
        return dtype
    if device not in auto_dtypes:
        auto_dtypes[device] = "bfloat16" if _bfloat16_is_faster(device) else "float32"
    return auto_dtypes[device]


def _bfloat16_is_faster(device):
    """Whether products of bfloat16 matrices clearly beat float32 on this device."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(10):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def autocast(device, dtype):
    """Context in which matrix products run in `dtype`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=resolve_dtype(device, dtype) == "bfloat16")


def seed(*numbers):
    """Begin the stream of torch's random numbers that belongs to these whole numbers, independent of all others."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


@contextlib.contextmanager
def deterministic(device):
    """Within, a CPU adds in one order, so that two runs of a seed are the same bit for bit."""
    if device != "cpu":
        yield
        return
    usual = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(usual[0])
        torch.utils.deterministic.fill_uninitialized_memory = usual[1]


def peak_memory_mb(device):
    """Peak resident memory of this process, or the accelerator's peak allocation, in MB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
