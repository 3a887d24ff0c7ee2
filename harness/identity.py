"""What identifies a run: the commit of the repository, the text of the rung, and the tokens that it read."""

import hashlib
import os
import subprocess
from pathlib import Path

from harness.cli import source_hash

ROOT = Path(__file__).resolve().parents[1]
GIT_SECONDS = 3  # after which the commit counts as unknown


def commit(folder=ROOT, seconds=GIT_SECONDS):
    """The git commit of the repository in `folder`, with " with changes" after it if a Python file that git tracks
    differs from it. None if that cannot be found out: no git, no repository, one that git does not trust."""
    if not (folder / ".git").exists():  # a repository around this folder is another one
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


def tokens_hash(tokens):
    """One hash of the tokens of all splits, as `load_tokens` gives them; None if their digests are not known."""
    digests = [getattr(tokens.get(split), "digest", "") for split in ("train", "val", "test")]
    return short_hash(" ".join(digests)) if all(digests) else None


def identity(run):
    """What the summary of a run says of it."""
    return {"commit": commit(), "rung_sha256": source_hash(run.rung), "tokens_sha256": tokens_hash(run.tokens)}
