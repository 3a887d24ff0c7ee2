"""Processes, device, precision and random numbers of a run."""

import contextlib
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from harness.cli import constants
from harness.errors import UserError

# How long a process waits for the others: while one prepares the text, until the first step is done, and afterwards.
PREPARATION, FIRST_STEP, TIMEOUT = timedelta(hours=24), timedelta(hours=1), timedelta(minutes=10)


def rank():
    """The number of this process, from 0, among those that torchrun started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together: 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(x):
    """The sum over all processes of the tensor `x`, on the CPU."""
    if world_size() > 1:
        x = x.to("cuda") if dist.get_backend() == "nccl" else x
        dist.all_reduce(x)
    return x.cpu()


def to_device(x, device):
    """Copy `x` from the CPU to the device. A GPU copies it from pinned memory while the program continues."""
    return x.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else x.to(device)


def all_agree(yes):
    """Whether `yes` is true in every process."""
    return all_reduce(torch.tensor([int(not yes)])).item() == 0


def share_batches(batches):
    """Yield (batch, whether it counts) for this process's share of `batches`. All processes make the same number of
    passes, since a forward pass of a sharded model needs all of them: if the batches do not divide evenly, some
    processes repeat the last batch, which then does not count."""
    for i in range(rank(), -(-len(batches) // world_size()) * world_size(), world_size()):
        yield batches[min(i, len(batches) - 1)], i < len(batches)


@contextlib.contextmanager
def processes(rung):
    """Context in which the processes that torchrun started are connected, and only the first one prints. Raises
    UserError if they cannot work together.

    The first process of each machine makes the token files, if there are none, while the others wait. After that they
    wait for each other: longer for the first step, which may be compiled, than for later ones.
    """
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    on_gpu, local_rank, n = rung["DEVICE"].startswith("cuda"), int(os.environ["LOCAL_RANK"]), os.environ["WORLD_SIZE"]
    if "SHARD" not in rung:  # every process would train on the same batches
        raise UserError(f"this rung trains in one process only; start it with python {Path(rung['__file__']).name}")
    if rung["BATCH_SIZE"] % int(n):
        raise UserError(f"BATCH_SIZE={rung['BATCH_SIZE']} must be a multiple of {n}, the number of processes")
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if local_rank == 0 and rung["PROMPT"] is None:
        rung["load_tokens"](rung["VOCABULARY"], rung["DATA"])
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PREPARATION)
    _wait_no_longer_than(FIRST_STEP)
    _decide_for_all(rung)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        try:
            yield
        except SystemExit:  # after a signal, all of them stop at the same step
            dist.destroy_process_group()
            raise
    # Without this, threads of gloo might still hold tensors while Python ends, and crash the process. An error ends the
    # process without it, since it waits for the others, which may be gone.
    dist.destroy_process_group()


def _decide_for_all(rung):
    """Let the first process decide for all what DTYPE="auto" means, since each might measure something else. Raises
    UserError if the processes were given different constants."""
    given, device = [None] * world_size(), rung["DEVICE"]
    faster = resolve_dtype(device, "auto") if rank() == 0 else None
    dist.all_gather_object(given, ({name: rung[name] for name in constants(rung)}, faster))
    (first, faster), others = given[0], [constants for constants, _ in given[1:]]
    for other in others:
        if differ := [name for name in first if first[name] != other.get(name)]:
            name = differ[0]
            raise UserError(f"{name} is {first[name]!r} in one process and {other.get(name)!r} in another; start all "
                            "processes with the same constants")  # fmt: skip
    auto_dtypes[device] = faster


def first_step_is_done():
    """From now on, processes wait for each other for at most `TIMEOUT`."""
    if world_size() > 1:
        _wait_no_longer_than(TIMEOUT)


def _wait_no_longer_than(time):
    dist.distributed_c10d._set_pg_timeout(time, dist.group.WORLD)


def share(model):
    """The model, ready to be trained by several processes: each holds a full copy and sees its own part of every batch,
    and DistributedDataParallel averages the gradients (Li et al. 2020, arXiv:2006.15704). A model that `shard` has
    divided averages them itself."""
    whole = world_size() > 1 and not is_sharded(model)
    return nn.parallel.DistributedDataParallel(model) if whole else model


def sync_gradients(model, now):
    """Context for a forward and backward pass. `now`: whether the processes average their gradients in it, as they do
    for the last of several micro-batches."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)
        return contextlib.nullcontext()
    return model.no_sync() if world_size() > 1 and not now else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------
# Models that are divided among processes
# ----------------------------------------------------------------------------------------------------------


def shard(model):
    """Divide the parameters of a transformer among the processes, in place, and with them the gradients and the state
    of the optimizer. A process collects the parameters of a block just before it computes the block, and frees them
    afterwards (fully sharded data parallel, Zhao et al. 2023, arXiv:2304.11277)."""
    from torch.distributed.fsdp import fully_shard  # loaded only where it is used

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def is_sharded(model):
    """Whether `shard` has divided the model."""
    return hasattr(model, "set_requires_gradient_sync")


def _full(x):
    """The whole of the tensor `x`, which may be divided (a DTensor). All processes must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole(x):
    """`x`, a tensor or dicts and lists of tensors, with each divided tensor replaced by the whole one on the CPU. All
    processes must call this."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(whole(value) for value in x)
    return _full(x).cpu() if hasattr(x, "full_tensor") else x


def like(x, other):
    """The whole tensor `x`, divided in the same way as `other`."""
    if not hasattr(other, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    device = other.device_mesh.device_type
    return distribute_tensor(x.to(device), other.device_mesh, other.placements, src_data_rank=None)


def like_param(x, param):
    """`x`, a value that an optimizer keeps for the parameter, divided in the same way if it has the same shape."""
    return like(x, param) if torch.is_tensor(x) and x.shape == param.shape else x


def divide_work(function, matrices):
    """Apply `function` to the `matrices` (rows, columns), stacked to (n, rows, columns). Each process computes a part,
    then they exchange the results. Returns a list of results, divided in the same way as the matrices."""
    stack = torch.stack([_full(x) for x in matrices])
    if world_size() == 1:
        return function(stack).unbind()
    n = -(-len(stack) // world_size())  # matrices per process; the last ones may have fewer, or none
    mine, part = stack[rank() * n :][:n], stack.new_zeros(n, *stack.shape[1:])
    if len(mine):
        part[: len(mine)] = function(mine)
    results = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(results, part)
    return [like(result, matrix) for result, matrix in zip(torch.cat(results), matrices)]


class Numbers:
    """Three numbers of a step on their way from the device: its loss and the norm of its gradient, both averaged over
    all processes, and how many stop signals the processes have received. `read` waits for them."""

    def __init__(self, device, loss, grad_norm, signals):
        where = loss.device if torch.is_tensor(loss) else "cpu"
        loss, grad_norm = (_full(torch.as_tensor(x)) for x in (loss, grad_norm))
        dtype = torch.float32 if device.startswith("mps") else torch.double
        signals = torch.tensor([signals], dtype=dtype, device=where)
        self.numbers, self.arrived = torch.cat([torch.stack([loss, grad_norm]).to(where, dtype), signals]), None
        if world_size() > 1:
            dist.all_reduce(self.numbers)
        if self.numbers.is_cuda:
            self.numbers = torch.empty(3, dtype=dtype, pin_memory=True).copy_(self.numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        """(loss, grad_norm, signals)"""
        if self.arrived:
            self.arrived.synchronize()
        loss, grad_norm, signals = self.numbers.tolist()
        return loss / world_size(), grad_norm / world_size(), signals


# ----------------------------------------------------------------------------------------------------------
# Precision, random numbers, memory
# ----------------------------------------------------------------------------------------------------------


auto_dtypes = {}  # device: what DTYPE="auto" means there, decided once


def resolve_dtype(device, dtype):
    """The name of the type for matrix products: `dtype`, or the faster of float32 and bfloat16 if it is "auto"."""
    if dtype != "auto":
        return dtype
    if device not in auto_dtypes:
        auto_dtypes[device] = "bfloat16" if _bfloat16_is_faster(device) else "float32"
    return auto_dtypes[device]


def _bfloat16_is_faster(device):
    """Whether products of bfloat16 matrices are clearly faster than float32 on this device."""
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
    """Seed torch with these whole numbers. Different numbers give independent streams of random numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


@contextlib.contextmanager
def deterministic(device):
    """Context in which a CPU always adds in the same order, so that two runs of one seed are the same bit for bit."""
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
    with contextlib.suppress(OSError, TypeError):  # not every /proc has this line
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        with contextlib.suppress(Exception):  # a missing figure must not end a run
            import psutil

            return psutil.Process().memory_info().peak_wset / 1e6
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
