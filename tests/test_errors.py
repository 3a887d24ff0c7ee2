"""What a mistake in a rung that somebody has edited looks like, and what is said to a user in one line instead."""

import re

import pytest
import torch

import forks
import harness
from common import ROOT, SMALL
from harness.cli import in_one_line
from harness.errors import UserError, too_few_tokens

CONSTANTS = {**SMALL["v3"], "DEVICE": "cpu", "BATCH_SIZE": 4, "BLOCK_SIZE": 32, "MAX_STEPS": 2, "SAMPLE_TOKENS": 4,
             "VOCABULARY": "bpe_vocab_500.json"}  # fmt: skip
MISTAKES = {  # what is wrong: (old, new, the error)
    "shape": ("y = kernels.attention(q, k, v)", "y = kernels.attention(q, k.mT, v)", "RuntimeError"),
    "unpacking": ("B, T, C = x.shape", "B, T = x.shape", "ValueError"),
    "name": ("x = self.norm(self.blocks(self.dropout(x)))", "x = self.norm(self.block(self.dropout(x)))",
             "AttributeError"),
    "type": ("self.proj = nn.Linear(N_EMBD, N_EMBD)", 'self.proj = nn.Linear(N_EMBD, "N_EMBD")', "TypeError"),
    "value": ("self.dropout = kernels.Dropout(DROPOUT)\n        self.blocks",
              "self.dropout = nn.Dropout(2)\n        self.blocks", "ValueError"),
    "index": ("weight[: idx.size(1)]", "weight[torch.arange(999)]", "IndexError"),
    "import": ("def main():", "def main():\n    import nosuchmodule", "ModuleNotFoundError"),
    "file": ("def main():", "def main():\n    open('nosuchfile')", "FileNotFoundError"),
    "ids": ("logits = model(windows[:, :-1])", "logits = model(windows[0, :-1])", "InputError: a model takes ids as a"),
    "positions": ("model(windows[:, :-1])", "model(windows.repeat(1, 9))", "InputError: .* only 32"),
    "own error": ("def main():", "def main():\n    raise OSError(28, 'No space left on device')", "OSError"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_edited_rung_keeps_its_file_and_line(mistake, data_dir, tmp_path):
    old, new, error = MISTAKES[mistake]
    text = (ROOT / "v3.py").read_text(encoding="utf-8")
    assert text.count(old) >= 1
    edited = text.replace(old, new, 1)
    line = next(n for n, (a, b) in enumerate(zip(text.split("\n"), edited.split("\n")), 1) if a != b)
    script = tmp_path / "v3_mine.py"
    script.write_text(edited, encoding="utf-8")
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    words = ["-c", code, *(f"{k}={v}" for k, v in CONSTANTS.items()), f"DATA={data_dir}", f"OUT_DIR={tmp_path / 'out'}"]
    done = forks.run(words, tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and f'v3_mine.py", line {line}' in done.stderr
    assert re.search(error, done.stderr.strip().splitlines()[-1])


RUNG = {"__file__": "v3.py", "MICRO_BATCH_SIZE": 4, "N_EMBD": 8, "DEVICE": "cuda", "RESUME": False, "PROMPT": None}


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), OSError(12, "Cannot allocate memory"),
])  # fmt: skip
def test_too_little_memory_says_what_to_lower(error):
    assert in_one_line(error, RUNG).startswith("out of memory; lower MICRO_BATCH_SIZE to 2 or N_EMBD (")
    assert "lower MICRO_BATCH_SIZE to 2 (" in in_one_line(error, RUNG | {"RESUME": True})  # the shape must stay
    assert "set DEVICE=cpu (" in in_one_line(error, RUNG | {"PROMPT": "a"})  # which needs no batch


def test_only_what_can_be_lower_is_named(monkeypatch):
    def advice(**constants):
        return in_one_line(MemoryError(), RUNG | {"N_EMBD": 1} | constants)

    assert advice(MICRO_BATCH_SIZE=16, BATCH_SIZE=16).startswith("out of memory; lower MICRO_BATCH_SIZE to 8 (")
    assert advice(MICRO_BATCH_SIZE=16, BATCH_SIZE=9).startswith("out of memory; lower MICRO_BATCH_SIZE to 3 (")
    assert advice(MICRO_BATCH_SIZE=1, BLOCK_SIZE=8).startswith("out of memory; lower BLOCK_SIZE (")
    assert "close other programs" in advice(MICRO_BATCH_SIZE=1, BLOCK_SIZE=8, RESUME=True)
    assert "lower BLOCK_SIZE (" in advice(MICRO_BATCH_SIZE=1, BLOCK_SIZE=8, N_EMBD=8, INIT_FROM="runs/v3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "MICRO_BATCH_SIZE to 2 (" in advice(MICRO_BATCH_SIZE=16, BATCH_SIZE=16)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError("memory format unsupported"),
    torch.distributed.DistBackendError("NCCL error: invalid usage"), ValueError("x"), OSError(2, "No such file", "x"),
    ImportError("no module"), RuntimeError("Expected a contiguous tensor in shared memory"),
])  # fmt: skip
def test_other_errors_are_not_explained(error):
    assert in_one_line(error, RUNG) is None


@pytest.mark.parametrize("error", [
    torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
])  # fmt: skip
def test_the_end_of_another_process_says_so(error):
    assert in_one_line(error, RUNG).startswith("another process has ended; RESUME=True")


@pytest.mark.parametrize("n", [2, 3, 290, 511, 512, 4000, 4351])
def test_the_advice_for_a_short_text_makes_a_batch(n, load):
    module = load("v3", BATCH_SIZE=16, BLOCK_SIZE=256)
    with pytest.raises(UserError) as caught:
        module.window_starts(n, 16, 256, 1337, 0)
    words = str(caught.value).replace(",", "").replace(";", "").split()
    if "lower" in words:
        size, block = int(words[words.index("to") + 1]), 256
    else:
        size, block = (int(next(w for w in words if w.startswith(name)).split("=")[1])
                       for name in ("BATCH_SIZE", "BLOCK_SIZE"))  # fmt: skip
    starts = module.window_starts(n, size, block, 1337, 0)
    assert 0 <= starts.min() and starts.max() + block < n and starts.shape[1] == size


def test_the_classes_of_errors():
    assert issubclass(harness.FileError, (OSError, UserError)) and issubclass(UserError, ValueError)
    assert issubclass(harness.MissingFileError, FileNotFoundError)
    assert "290" in str(too_few_tokens(290, 16, 256))
