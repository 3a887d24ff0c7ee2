"""What identifies a run: the commit of the repository, the source of the rung, and the tokens that it read."""

import ast
import hashlib
import io
import os
import subprocess
import tokenize
from pathlib import Path

from harness.cli import source_as_loaded

ROOT = Path(__file__).resolve().parents[1]
GIT_SECONDS = 3  # if git takes longer, the commit counts as unknown
AFTER_TRAINING = ("draw", "generate", "sample")  # code of a rung with these names does not affect a loss


def commit(folder=ROOT, seconds=GIT_SECONDS):
    """The git commit of the repository in `folder`, followed by " with changes" if a tracked Python file differs from
    it. None if it cannot be found out: no git, no repository, or one that git does not trust."""
    if not (folder / ".git").exists():  # a repository further up is a different one
        return None
    words = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--", "*.py"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
    try:
        done = subprocess.run(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=seconds)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# branch.oid ")]
    if done.returncode or not names or names[0] == "(initial)":
        return None
    return names[0] + " with changes" * any(not line.startswith("#") for line in lines)


def short_hash(text):
    """The first 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def code_hash(text):
    """A hash of the code that determines the losses of a rung, given its source: without comments, docstrings and blank
    lines, without the constants, whose values are compared one by one, and without the code that only samples."""
    tree, lines = ast.parse(text), [line.encode() for line in io.StringIO(text).readlines()]
    spans = [(token.start, token.end) for token in tokenize.generate_tokens(io.StringIO(text).readline)
             if token.type == tokenize.COMMENT]  # in characters  # fmt: skip
    spans = [tuple((row, len(lines[row - 1].decode()[:column].encode())) for row, column in span) for span in spans]
    dropped = [node.body[0] for node in ast.walk(tree)
               if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in AFTER_TRAINING:
            dropped += [*node.decorator_list, node]
        elif isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
            names = [target.id for target in node.targets]
            if set(names) <= {*AFTER_TRAINING} or node in tree.body and all(map(str.isupper, names)):
                dropped.append(node)
    spans += [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in dropped]
    for (row, column), (end_row, end_column) in spans:  # dropped text becomes blanks, so that positions stay valid
        for k in range(row - 1, end_row):
            start, stop = column if k == row - 1 else 0, end_column if k == end_row - 1 else len(lines[k])
            lines[k] = lines[k][:start] + b" " * (stop - start) + lines[k][stop:]
    kept = [line.rstrip() for line in lines]
    return short_hash("\n".join(line.decode() for line in kept if line and line != b"@"))


def tokens_hash(tokens):
    """One hash of the tokens of all splits, as `load_tokens` gives them; None if their digests are unknown."""
    digests = [getattr(tokens.get(split), "digest", "") for split in ("train", "val", "test")]
    return short_hash(" ".join(digests)) if all(digests) else None


def identity(run):
    """The entries of a run's summary that identify it."""
    text = source_as_loaded(run.rung)
    return {"commit": commit(), "rung_sha256": short_hash(text), "code_sha256": code_hash(text),
            "tokens_sha256": tokens_hash(run.tokens)}  # fmt: skip
