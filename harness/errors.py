"""Errors for the person who started the program, in one line. Any other error is a mistake in the code, often in lines
that a reader has just changed, and keeps its traceback."""


class UserError(ValueError):
    """What is wrong, why, and what to do: something that the user can mend. A program prints it without a traceback."""


class FileError(UserError, OSError):
    """The same of a file that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """The same of a file or folder that is not there."""


class InputError(UserError):
    """What was given to a model does not fit it. In a rung the cause may be a line that a reader has changed, so there
    it keeps its traceback as well."""


def too_few_tokens(n_tokens, batch_size, block_size):
    """The error of a text that is too short for one batch: `batch_size` windows of `block_size` tokens, from a random
    offset of up to a window."""
    from harness.checks import process_count

    processes = process_count()  # each takes as many windows
    windows = (n_tokens // block_size - 1) // processes
    batch = processes * 2 ** max(0, windows.bit_length() - 1)  # a power of two: micro-batches divide it
    advice = (f"lower BATCH_SIZE to {batch}, or BLOCK_SIZE" if windows > 0
              else f"set BATCH_SIZE={batch} and BLOCK_SIZE={max(1, n_tokens // (batch + 1))}")  # fmt: skip
    return UserError(f"{batch_size} windows of {block_size} tokens need {(batch_size + 1) * block_size} tokens, and "
                     f"the training text has {n_tokens}; {advice}, or train on a longer text")  # fmt: skip
