"""Model FLOPs utilization (MFU): the share of a device's peak that the model's own arithmetic reaches (Chowdhery et al.
2022, arXiv:2204.02311, appendix B).

    MFU of a step = FLOPs per token * tokens of the step / (seconds of the step * peak of all devices)

The count covers the model's matrix products, including attention over whole windows. A step costs three times its
forward pass, since the backward pass has two products for each product of the forward pass. Embedding look-ups,
normalization, the optimizer, and anything computed a second time to save memory do not count.
"""

import contextlib
import copy
import functools
import re
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels

# Dense peaks in TFLOP/s: for bfloat16 on tensor cores, which accumulate in float32, and for float32, where torch does
# not use tensor cores by default. Figures come from the makers' documents; one given with sparsity is halved. Names are
# those of torch.cuda.get_device_name without maker, series and memory.
PEAKS = {
    "v100": (None, 15.7),  # V100 data sheet, SXM2; no bfloat16
    "v100 pcie": (None, 14),
    "v100s pcie": (None, 16.4),
    "t4": (None, 8.1),  # T4 data sheet; no bfloat16
    "a10": (125, 31.2),  # A10 data sheet
    "a30": (165, 10.3),  # A30 data sheet
    "a40": (149.7, 37.4),  # A40 data sheet
    "a100": (312, 19.5),  # A100 data sheet
    "a100 pcie": (312, 19.5),
    "l4": (121, 30.3),  # L4 data sheet
    "l40": (181, 90.5),  # L40 data sheet
    "l40s": (362, 91.6),  # L40S data sheet
    "h100": (989, 67),  # H100 data sheet, SXM
    "h100 pcie": (756, 51),
    "h100 nvl": (835, 60),
    "h200": (989, 67),  # H200 data sheet, SXM
    "h200 nvl": (835, 60),
    "gh200": (990, 67),  # GH200 data sheet
    "b200": (2250, 75),  # HGX B200 data sheet, an eighth
    "gb200": (2500, 80),  # GB200 NVL72 data sheet, half of a superchip
    "rtx 3090": (71, 35.6),  # white paper of the GA102 architecture
    "rtx a5000": (111.1, 27.8),  # RTX A5000 data sheet
    "rtx a6000": (154.8, 38.7),  # RTX A6000 data sheet
    "rtx 4090": (165.2, 82.6),  # white paper of the Ada architecture
    "rtx 6000 ada": (364.2, 91.1),  # RTX 6000 Ada data sheet
    "rtx 5090": (209.5, 104.8),  # white paper of the RTX Blackwell architecture
    "mi300x": (1307.4, 163.4),  # MI300X data sheet
}
NOT_IN_NAMES = r"nvidia|amd|tesla|geforce|instinct|generation|\d+gb?|hbm\w*|sxm\d*"
COLUMNS = ("bfloat16", "float32")
SECONDS = 0.02  # spent on each matrix size when a CPU is measured


@contextlib.contextmanager
def heads_of_their_own_width():
    """Context in which ALiBi counts like any attention. Computed without a mask it widens the heads, which would count.
    """
    usual = kernels.ALiBiAttention.__call__
    kernels.ALiBiAttention.__call__ = lambda self, q, k, v: kernels.attention(q, k, v)
    try:
        yield
    finally:
        kernels.ALiBiAttention.__call__ = usual


def forward_flops(model, batch):
    """FLOPs of the matrix products in `model(*batch)`. Nothing is computed: a copy of the model on the device "meta",
    where tensors have shapes but no values, makes the same calls."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    shapes = copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})
    with (
        torch.no_grad(),
        torch.device("meta"),
        heads_of_their_own_width(),
        sdpa_kernel(SDPBackend.MATH),  # it consists of matrix products, which are counted
        FlopCounterMode(display=False) as counter,
    ):
        shapes(*(torch.empty_like(x, device="meta") for x in batch))
    return counter.get_total_flops()


def per_token(model, batch):
    """FLOPs per token of a forward and backward pass of `model`, not yet compiled or sharded, on `batch`, (x, y). None
    if they cannot be counted: a model may need the values of its tensors."""
    try:
        window = [x[:1] for x in batch]
        return 3 * forward_flops(model, window) / window[0].numel()
    except Exception:  # if something is wrong with the model, training will show it
        return None


def peak(device, dtype):
    """The peak FLOP/s of matrix products of type `dtype` ("bfloat16", "float32") on one `device`: for a GPU the maker's
    figure, for a CPU a measurement. None if it is unknown."""
    kind = torch.device(device).type
    if kind == "cuda":
        return peak_of_gpu(torch.cuda.get_device_name(device), dtype)
    return peak_of_cpu(dtype, torch.get_num_threads()) if kind == "cpu" else None


def peak_of_gpu(name, dtype):
    """The peak of a GPU by its name, such as "NVIDIA H100 80GB HBM3". None for a part of a GPU (MIG): it reaches less.
    """
    words = [word for word in re.split(r"[^a-z0-9.]+", name.lower()) if word and not re.fullmatch(NOT_IN_NAMES, word)]
    row = dict(zip(COLUMNS, PEAKS.get(" ".join(words), ())))
    return row[dtype] * 1e12 if row.get(dtype) else None


@functools.cache
def peak_of_cpu(dtype, threads):
    """The peak of this CPU with `threads` threads: the best rate measured for products of square matrices. It takes a
    few tens of milliseconds, once per process."""
    best = 0.0
    for n in (512, 1024, 2048, 4096):
        if n > 1024 and 2 * n**3 > best * SECONDS:  # this would take too long, and smaller ones already reach the peak
            break
        a, times = torch.ones(n, n, dtype=getattr(torch, dtype)), []
        product = torch.empty_like(a)
        while len(times) < 2 or sum(times) < SECONDS:
            start = time.perf_counter()
            torch.mm(a, a, out=product)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * n**3 / min(times))
    return best
