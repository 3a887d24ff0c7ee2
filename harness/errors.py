"""Errors for the person who started the program, in one line. Any other error is a mistake in the code, often in lines
that a reader has just changed, and keeps its traceback."""


class UserError(ValueError):
    """What is wrong, why, and what to do: something that the user can mend. A program prints it without a traceback."""


class FileError(UserError, OSError):
    """The same of a file that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """The same of a file or folder that is not there."""


def too_few_tokens(n_tokens, batch_size, block_size):
    """The error of a text that is too short for one batch: `batch_size` windows of `block_size` tokens, from a random
    offset of up to a window."""
    largest = n_tokens // block_size - 1  # batch
    advice = (f"lower BATCH_SIZE to {largest}, or BLOCK_SIZE" if largest > 0
              else f"set BATCH_SIZE=1 and BLOCK_SIZE={n_tokens // 2}")  # fmt: skip
    return UserError(f"{batch_size} windows of {block_size} tokens need {(batch_size + 1) * block_size} tokens, and "
                     f"the training text has {n_tokens}; {advice}, or train on a longer text")  # fmt: skip
