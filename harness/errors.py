"""Errors that the user can fix, shown in one line. Any other error is a mistake in the code, often in a line that a
reader has just changed, and keeps its traceback."""


class UserError(ValueError):
    """An error that the user can fix. Its message says what is wrong, why, and what to do; a program prints it without
    a traceback."""


class FileError(UserError, OSError):
    """A UserError about a file that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A UserError about a file or folder that does not exist."""


class InputError(UserError):
    """The input of a model does not fit it. In a rung, the cause may be a line that a reader has changed, so the
    traceback is shown as well."""


def too_few_tokens(n_tokens, batch_size, block_size):
    """The error for a text that is too short for one batch: `batch_size` windows of `block_size` tokens, after a random
    offset of up to one window."""
    from harness.checks import process_count

    processes = process_count()  # all take the same number of windows
    windows = (n_tokens // block_size - 1) // processes
    batch = processes * 2 ** max(0, windows.bit_length() - 1)  # a power of two: micro-batches divide it
    advice = (f"lower BATCH_SIZE to {batch}, or BLOCK_SIZE" if windows > 0
              else f"set BATCH_SIZE={batch} and BLOCK_SIZE={max(1, n_tokens // (batch + 1))}")  # fmt: skip
    return UserError(f"a batch of {batch_size} windows of {block_size} tokens needs {(batch_size + 1) * block_size} "
                     f"tokens, but the training text has only {n_tokens}; {advice}, or train on a longer text")
