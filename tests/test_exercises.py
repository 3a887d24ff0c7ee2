"""Tests of the exercises: their checks pass with the solutions, say of a gap that it is a gap, and name what is wrong
with a typical wrong answer."""

import ast
import doctest
import functools
import importlib
import inspect
import re
import shutil

import pytest
from pytest import fail

import forks
from common import ROOT

FILES = ("tokenizer_bpe", "v0_bigram", "v1_windows", "v1_1_memory", "v2_attention", "sampling", "v3_training",
         "v3_1_muon", "v4_positions")  # fmt: skip


@functools.cache
def gaps(file):
    return importlib.import_module(f"exercises.{file}")


@functools.cache
def solutions(file):
    return importlib.import_module(f"exercises.solutions.{file}")


def functions(module):
    """Names of the functions that a module defines."""
    return [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]


EXERCISES = [(file, name) for file in FILES for name in functions(gaps(file))]


def check(file, exercise, answers):
    """The check of one exercise, with `answers` in place of the learner's module."""
    getattr(importlib.import_module(f"exercises.test_{file}"), f"test_{exercise}")(answers)


class Answers:
    """The solutions of a file, except for one function."""

    def __init__(self, file, name, function):
        self.__dict__ = {**vars(solutions(file)), name: function}


# Wrong answers: (file, exercise, text of the solution, wrong text, what the check says)
WRONG = [
    ("tokenizer_bpe", "pretokenize", r"| ?[^\sA-Za-z0-9]+", "", "characters are lost"),
    ("tokenizer_bpe", "pretokenize", r"\s+(?!\S)|", "", "of several spaces the last belongs to the word"),
    ("tokenizer_bpe", "pretokenize", r"'(?:[stmd]|ll|ve|re)|", "", "contractions are not cut off"),
    ("tokenizer_bpe", "pretokenize", "| ?[A-Za-z]+| ?[0-9]+|", "| ?[A-Za-z0-9]+|", "letters and digits should be sep"),
    ("tokenizer_bpe", "pretokenize", " ?", "", "a space belongs to the word that follows"),
    ("tokenizer_bpe", "pretokenize", "'(?:", "'(", "write (?:...)"),
    ("tokenizer_bpe", "pretokenize", " ?", r"\s?", "only a space belongs to the word"),
    ("tokenizer_bpe", "pretokenize", " ?", r"\s*", "of all the white space before a word"),
    ("tokenizer_bpe", "best_pair", "+= count", "+= 1", "as often as the pre-token occurs"),
    ("tokenizer_bpe", "best_pair", "min(counts, key=lambda pair: (-counts[pair], pair))", "counts.most_common(1)[0][0]",
     "the smallest is the best"),
    ("tokenizer_bpe", "best_pair", "min(counts, key=lambda pair: (-counts[pair], pair))",
     "max(counts, key=lambda pair: (counts[pair], pair))", "the smallest is the best"),
    ("tokenizer_bpe", "best_pair", "min(counts, key=lambda pair: (-counts[pair], pair))", "counts.most_common(1)[0]",
     "without its count"),
    ("tokenizer_bpe", "merge", "i += 2", "i += 1", "the right half of the pair stays"),
    ("tokenizer_bpe", "merge", "while i < len(ids):", "while i < len(ids) - 1:", "the last id is lost"),
    ("tokenizer_bpe", "merge", "== pair:", "== pair and new_id not in out:", "not only the first"),
    ("tokenizer_bpe", "merge", "out, i = [], 0", "out, i = [], ids.pop()", "the list that came in is changed"),
    ("tokenizer_bpe", "merge", "tuple(ids[i : i + 2])", "ids[i : i + 2]", "is a list compared with a tuple?"),
    ("tokenizer_bpe", "learn_merges", "[(list(pretoken), count)", "[(list(pretoken), 1)", "each pre-token counts as o"),
    ("tokenizer_bpe", "learn_merges", "words = [(list(pretoken), count) for pretoken, count in counts.items()]",
     "return [pair for pair, _ in Counter(pair for word, n in counts.items() for pair in [*zip(word, word[1:])] * n)"
     ".most_common(n_merges)]", "256, should take part"),
    ("tokenizer_bpe", "learn_merges", "256 + len(merges)", "257 + len(merges)", "the first merge makes id 256"),
    ("tokenizer_bpe", "learn_merges", "words = [(merge(ids", "_ = [(merge(ids", "each round finds the same pair"),
    ("tokenizer_bpe", "learn_merges", "return merges", "return merges + [None] * (n_merges - len(merges))", "stop"),
    ("tokenizer_bpe", "encode_pretoken", "min(zip(ids, ids[1:]), key=lambda pair: merge_id.get(pair, math.inf))",
     "next((pair for pair in zip(ids, ids[1:]) if pair in merge_id), None)", "not the leftmost"),
    ("tokenizer_bpe", "encode_pretoken", "merge(ids, pair, merge_id[pair])",
     "merge(ids, pair, merge_id[pair])\n        return ids", "merged tokens merge again"),
    ("tokenizer_bpe", "encode_pretoken", "min(zip(ids, ids[1:]), key=lambda pair: merge_id.get(pair, math.inf))",
     "max(zip(ids, ids[1:]), key=lambda pair: merge_id.get(pair, -1))", "not the last learned"),
    ("tokenizer_bpe", "encode_pretoken", "ids = merge(ids, pair, merge_id[pair])",
     "k = [*zip(ids, ids[1:])].index(pair)\n        ids[k : k + 2] = [merge_id.pop(pair)]", "wherever it occurs"),
    ("tokenizer_bpe", "decode", 'b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")',
     '"".join(pieces[i].decode("utf-8", errors="replace") for i in ids)', "a character may need several tokens"),
    ("tokenizer_bpe", "decode", '.decode("utf-8", errors="replace")', '.decode("latin-1")', "a byte is not a char"),
    ("tokenizer_bpe", "decode", ', errors="replace"', "", "should become U+FFFD"),
    ("tokenizer_bpe", "decode", '"replace"', '"ignore"', "should become U+FFFD"),
    ("tokenizer_bpe", "decode", "bytes([i])", "bytes(i)", "three bytes of 0"),
    ("tokenizer_bpe", "decode", "pieces[left] + pieces[right]", "pieces[right] + pieces[left]", "are exchanged"),
    ("v0_bigram", "softmax", "(logits - logits.amax(-1, keepdim=True))", "logits", "exp(1000) overflows"),
    ("v0_bigram", "softmax", "weights.sum(-1, keepdim=True)", "weights.sum(0)", "not right"),
    ("v0_bigram", "softmax", "(-1, keepdim=True)", "(0, keepdim=True)", "each row should sum to 1"),
    ("v0_bigram", "softmax", " / weights.sum(-1, keepdim=True)", "", "not divided by their sum"),
    ("v0_bigram", "softmax", "weights.sum(-1, keepdim=True)", "weights.sum()", "divide by the sum of the row"),
    ("v0_bigram", "softmax", "logits - logits", "logits / logits", "it should be subtracted"),
    ("v0_bigram", "softmax", "(-1, keepdim=True)", "(1, keepdim=True)", "with three dimensions too"),
    ("v0_bigram", "cross_entropy", ".mean()", ".sum()", "not their sum"),
    ("v0_bigram", "cross_entropy", "-log_p", "log_p", "a loss is positive"),
    ("v0_bigram", "cross_entropy", "torch.log_softmax(logits, -1)", "logits", "log_softmax is missing"),
    ("v0_bigram", "cross_entropy", "torch.log_softmax(logits, -1)", "torch.softmax(logits, -1).log2()", "be in nats"),
    ("v0_bigram", "cross_entropy", "log_softmax", "softmax", "the logarithm is missing"),
    ("v0_bigram", "cross_entropy", "softmax(logits, -1)", "softmax(logits, 0)", "should run over the vocabulary"),
    ("v0_bigram", "cross_entropy", "torch.arange(len(targets))", ":", "takes one number of each"),
    ("v0_bigram", "cross_entropy", ".mean()", "", "it should be one number"),
    ("v0_bigram", "cross_entropy_gradient", " / len(targets)", "", "divide by N"),
    ("v0_bigram", "cross_entropy_gradient", "-= 1", "-= 0", "one-hot of the target is missing"),
    ("v0_bigram", "cross_entropy_gradient", "return gradient", "return -gradient", "the sign is wrong"),
    ("v0_bigram", "cross_entropy_gradient", "softmax(logits, -1)", "softmax(logits, 0)", "run over the vocabulary"),
    ("v0_bigram", "cross_entropy_gradient", "len(targets)\n", "logits.numel()\n", "not over all N * V numbers"),
    ("v0_bigram", "cross_entropy_gradient", "-= 1", "-= len(targets)", "divided by N too"),
    ("v0_bigram", "cross_entropy_gradient", "torch.arange(len(targets))", ":", "at the targets of all rows"),
    ("v0_bigram", "start_loss", "math.log(", "math.log2(", "should be in nats"),
    ("v0_bigram", "start_loss", "math.log(", "-math.log(", "a loss is positive"),
    ("v0_bigram", "start_loss", "math.log(", "math.log10(", "the natural logarithm, math.log"),
    ("v0_bigram", "start_loss", "math.log(vocab_size)", "1 / vocab_size", "this is the probability of a token"),
    ("v0_bigram", "bigram_probabilities", "torch.where(n_i > 0, n / n_i, 1 / vocab_size)", "n / n_i", "is 0 / 0"),
    ("v0_bigram", "bigram_probabilities", "1 / vocab_size)", "0.0)", "here it is zero"),
    ("v0_bigram", "bigram_probabilities", "ids[:-1] * vocab_size + ids[1:]", "ids[1:] * vocab_size + ids[:-1]",
     "not right"),
    ("v0_bigram", "bigram_probabilities", "return torch.where(n_i > 0, n / n_i, 1 / vocab_size)", "return n.float()",
     "these are counts"),
    ("v0_bigram", "bigram_probabilities", "view(vocab_size, vocab_size)", "view(vocab_size, vocab_size).clamp(max=1)",
     "each pair counts once"),
    ("v0_bigram", "bigram_probabilities", "n.sum(1, keepdim=True)",
     "torch.bincount(ids, minlength=vocab_size)[:, None]", "nothing follows the last token"),
    ("v0_bigram", "bits_per_byte", "math.log(2) * n_bytes", "n_bytes", "divide by log(2)"),
    ("v0_bigram", "bits_per_byte", "loss * n_predicted / (math.log(2) * n_bytes)", "loss / math.log(2)", "per token"),
    ("v0_bigram", "bits_per_byte", "loss * n_predicted / (math.log(2) * n_bytes)",
     "math.log2(loss) * n_predicted / n_bytes", "a logarithm already"),
    ("v0_bigram", "word_perplexity", "loss * n_predicted / n_words", "loss", "this is the perplexity per token"),
    ("v0_bigram", "word_perplexity", "math.exp(loss * n_predicted / n_words)",
     "math.exp(loss) * n_predicted / n_words", "perplexities do not"),
    ("v0_bigram", "word_perplexity", "loss *", "loss / math.log(2) *", "need not be divided by log(2)"),
    ("v1_windows", "batch_of_windows", "windows[:, :-1], windows[:, 1:]", "windows[:, :-1], windows[:, :-1]",
     "the targets are the inputs"),
    ("v1_windows", "batch_of_windows", "windows[:, :-1], windows[:, 1:]",
     "windows[:, :-1], windows[:, :-1].roll(-1, 1)", "first token of its window"),
    ("v1_windows", "batch_of_windows", "block_size + 1", "block_size", "a token too few"),
    ("v1_windows", "batch_of_windows", "ids[starts[:, None] + torch.arange(block_size + 1)]",
     "starts[:, None] + torch.arange(block_size + 1)", "these are the places"),
    ("v1_windows", "batch_of_windows", "windows[:, 1:]", "windows[:, :-1] + 1", "1 is added to the ids"),
    ("v1_windows", "batch_of_windows", "windows[:, :-1], ", "windows, ", "x has the shape (3, 6)"),
    ("v1_windows", "batches_in_epoch", "(n_tokens - block_size)", "n_tokens", "beyond the end of the text"),
    ("v1_windows", "batches_in_epoch", "(n_tokens - block_size)", "(n_tokens - 1)", "beyond the end of the text"),
    ("v1_windows", "batches_in_epoch", "//", "/", "divide with //"),
    ("v1_windows", "batches_in_epoch", "(n_tokens - block_size) //", "1 + (n_tokens - block_size) //", "round down"),
    ("v1_windows", "batches_in_epoch", "(n_tokens - block_size)", "(n_tokens - block_size - 1)", "a token too many"),
    ("v1_windows", "batches_in_epoch", "(n_tokens - block_size) // (batch_size * block_size)",
     "n_tokens // (batch_size * (block_size + 1))", "windows begin T tokens apart"),
    ("v1_windows", "embed_by_product", "F.one_hot(idx, len(weight))", "F.one_hot(idx)", "should have V numbers"),
    ("v1_windows", "context_windows", "(0, 0, context_size - 1, 0)", "(0, 0, 0, context_size - 1)",
     "the future leaks: output 0 changes when token 1 changes"),
    ("v1_windows", "context_windows", ".flatten(2)", ".mT.flatten(2)", "each embedding is in one piece"),
    ("v1_windows", "context_windows", "context_size - 1, 0))", "context_size, 0))[:, :-1]", "missing from its own"),
    ("v1_windows", "context_windows", "F.pad(x, (0, 0, context_size - 1, 0))",
     "torch.cat([x[:, 1 - context_size :], x], 1)", "an index below 0 counts from the end"),
    ("v1_windows", "context_windows", ".flatten(2)", "", "has the shape (2, 5, 3, 4); it should have (2, 5, 12)"),
    ("v1_windows", "mlp_logits", ".tanh()", "", "the tanh is missing"),
    ("v1_windows", "mlp_logits", ".tanh()", ".relu()", "has tanh, not ReLU"),
    ("v1_windows", "mlp_logits", " + head_bias", "", "the bias of the last layer is missing"),
    ("v1_windows", "mlp_logits", ".tanh()", ".sigmoid()", "not the logistic sigmoid"),
    ("v1_windows", "mlp_logits", " + hidden_bias).tanh()", ").tanh() + hidden_bias", "belongs within tanh"),
    ("v1_windows", "n_parameters", " + 1)", ")", "the biases are missing"),
    ("v1_windows", "n_parameters", "context_size * n_embd", "n_embd", "reads context_size embeddings"),
    ("v1_windows", "n_parameters", "(n_hidden + 1) * vocab_size", "n_hidden * vocab_size + n_hidden", "the last has V"),
    ("v1_windows", "n_parameters", "vocab_size * n_embd", "vocab_size * context_size * n_embd", "share one table"),
    ("v1_1_memory", "accumulated_gradient", " * (len(micro_x) / len(x))", "", "without a factor"),
    ("v1_1_memory", "accumulated_gradient", "len(micro_x) / len(x)", "1 / len(x.split(micro_batch_size))",
     "should count less than the others"),
    ("v1_1_memory", "accumulated_gradient", "gradient +=", "gradient =", "only the last micro-batch counts"),
    ("v1_1_memory", "accumulated_gradient", ".split(micro_batch_size)", ".split(len(x))", "got 10 rows at once"),
    ("v1_1_memory", "accumulated_gradient", "len(micro_x) / len(x)", "micro_batch_size / len(x)", "its share is len("),
    ("v1_1_memory", "accumulated_gradient", "len(micro_x) / len(x)", "len(micro_x)", "by the number of all rows"),
    ("v1_1_memory", "loss_in_chunks", "loss / len(x)", "loss", "divide by N"),
    ("v1_1_memory", "loss_in_chunks", ', reduction="sum")', ") / -(-len(x) // chunk_size) * len(x)", "counts too much"),
    ("v1_1_memory", "loss_in_chunks", ".split(chunk_size)", ".split(len(x))", "10 rows of logits exist at once"),
    ("v1_1_memory", "loss_in_chunks", ', reduction="sum")', ") * chunk_size", "by its own length, not by"),
    ("v1_1_memory", "loss_in_chunks", "return loss", "loss -= F.cross_entropy(x_chunk @ weight.T + bias, target, "
     "reduction='sum')\n    x = x[: -len(target)]\n    return loss", "the mean should be over all tokens"),
    ("v1_1_memory", "gradients_in_chunks", "d /= len(x)", "d /= len(target)", "divided by its own length"),
    ("v1_1_memory", "gradients_in_chunks", "d_weight += d.T @ x_chunk\n        d_bias += d.sum(0)",
     "d_weight = d.T @ x_chunk\n        d_bias = d.sum(0)", "should be added"),
    ("v1_1_memory", "gradients_in_chunks", ".split(chunk_size)", ".split(len(x))", "10 rows of logits"),
    ("v1_1_memory", "gradients_in_chunks", "d_bias += d.sum(0)", "d_bias += d.mean(0)", "not their mean"),
    ("v1_1_memory", "gradients_in_chunks", "weight.T + bias", "weight.T", "the bias is missing in the logits"),
    ("v2_attention", "causal_mask", "triu(1)", "triu()", "a token should see itself"),
    ("v2_attention", "causal_mask", "triu(1)", "tril(-1)", "the mask is transposed"),
    ("v2_attention", "causal_mask", "triu(1)", "tril()", "the mask is inverted"),
    ("v2_attention", "causal_mask", ", dtype=torch.bool", "", "should be of bool"),
    ("v2_attention", "causal_mask", "triu(1)", "triu(2)", "the next token is in the future too"),
    ("v2_attention", "one_head", " / math.sqrt(q.size(-1))", "", "the scores were not divided by sqrt(D)"),
    ("v2_attention", "one_head", "math.sqrt(q.size(-1))", "math.sqrt(x.size(-1))", "divided by sqrt(C)"),
    ("v2_attention", "one_head", "scores = scores.masked_fill(causal_mask(len(x)), -math.inf)", "pass",
     "the future leaks: output 0 changes when token 1 changes"),
    ("v2_attention", "one_head", "-math.inf", "0", "exp(0) is 1, so it needs -inf"),
    ("v2_attention", "one_head", "softmax(-1)", "softmax(0)", "the softmax runs over the queries"),
    ("v2_attention", "one_head", "causal_mask(len(x))", "torch.ones(len(x), len(x)).bool().triu()", "contains nan"),
    ("v2_attention", "one_head", "scores.softmax(-1)", "(scores.exp().log().nan_to_num(neginf=0) / "
     "scores.exp().log().nan_to_num(neginf=0).sum(1, keepdim=True))", "the softmax is missing"),
    ("v2_attention", "one_head", " / math.sqrt(q.size(-1))", "\n    v = v / math.sqrt(q.size(-1))",
     "not the weights after it"),
    ("v2_attention", "one_head", "scores = scores.masked_fill(causal_mask(len(x)), -math.inf)",
     "scores = scores + causal_mask(len(x)) * -math.inf", "0 * -inf is nan"),
    ("v2_attention", "split_heads", "3, n_head, width // 3 // n_head).permute(2, 0, 3, 1, 4)",
     "n_head, 3, width // 3 // n_head).permute(3, 0, 2, 1, 4)", "not head by head"),
    ("v2_attention", "split_heads", "(2, 0, 3, 1, 4)", "(2, 0, 1, 3, 4)", "heads and tokens are exchanged"),
    ("v2_attention", "split_heads", "qkv.view(B, T, 3, n_head, width // 3 // n_head).permute(2, 0, 3, 1, 4)",
     "qkv.view(3, B, n_head, T, width // 3 // n_head)", "view does not move numbers"),
    ("v2_attention", "join_heads", "y.transpose(1, 2)", "y", "tokens are mixed"),
    ("v2_attention", "layer_norm", "centered.square().mean(-1, keepdim=True)", "x.var(-1, keepdim=True)", "C - 1"),
    ("v2_attention", "layer_norm", " * weight + bias", "", "`weight` and `bias` are missing"),
    ("v2_attention", "layer_norm", "(variance + 1e-5).sqrt()", "(variance.sqrt() + 1e-5)", "belongs under the root"),
    ("v2_attention", "layer_norm", "centered /", "x /", "the mean is not subtracted"),
    ("v2_attention", "layer_norm", "(variance + 1e-5).sqrt()", "(x.std(-1, keepdim=True) + 1e-5)",
     "the standard deviation divides by C - 1"),
    ("v2_attention", "layer_norm", " * weight + bias", " * weight + bias * weight", "`bias` is added last"),
    ("v2_attention", "layer_norm", "(-1, keepdim=True)", "(0, keepdim=True)", "should be over the last dimension, the"),
    ("v2_attention", "layer_norm", "(-1, keepdim=True)", "(1, keepdim=True)", "here they are over the tokens of"),
    ("v2_attention", "post_norm_block", "x = norm_1(x + attention(x))\n    return norm_2(x + mlp(x))",
     "x = x + attention(norm_1(x))\n    return x + mlp(norm_2(x))", "this is pre-norm"),
    ("v2_attention", "post_norm_block", "(x + ", "(", "the residual connections are missing"),
    ("v2_attention", "post_norm_block", "norm_2(x", "norm_1(x", "the second LayerNorm is norm_2"),
    ("v2_attention", "post_norm_block", "norm_1(x + attention(x))\n    return norm_2(x + mlp(x))",
     "norm_1(x) + attention(x)\n    return norm_2(x) + mlp(x)", "applied before the sum"),
    ("v2_attention", "post_norm_block", "x = norm_1(x + attention(x))\n    return norm_2(x + mlp(x))",
     "x = x + attention(x)\n    return norm_2(norm_1(x) + mlp(x))", "the MLP should get what comes out"),
    ("sampling", "with_temperature", "logits / temperature", "logits * temperature", "multiplied by the temperature"),
    ("sampling", "with_temperature", "temperature == 0", "temperature < 0", "at temperature 0"),
    ("sampling", "with_temperature", "p = torch.zeros_like(logits)\n", "return logits.softmax(-1)\n", "have the prob"),
    ("sampling", "with_temperature", "p = torch.zeros_like(logits)\n", "return logits.argmax()\n", "this is the place"),
    ("sampling", "top_k", " / kept.sum()", "", "does not sum to 1"),
    ("sampling", "top_k", "kept[places] = values", "kept[:k] = values", "have lost their places"),
    ("sampling", "top_k", "values, places = p.topk(k)\n    kept = torch.zeros_like(p)\n    kept[places] = values",
     "kept = p.clone()\n    kept[p.argsort()[:k]] = 0", "the k smallest are set to 0"),
    ("sampling", "top_k", "kept = torch.zeros_like(p)\n    kept[places] = values",
     "kept = p.clone()\n    kept[places] = 0", "the k largest are set to 0"),
    ("sampling", "top_k", "kept[places] = values", "kept[:k] = p[:k]", "the first k tokens are kept"),
    ("sampling", "top_k", "kept[places] = values", "kept[places[:-1]] = values[:-1]", "one token too few"),
    ("sampling", "top_p", "ranked.cumsum(0) - ranked", "ranked.cumsum(0)", "it should always stay"),
    ("sampling", "top_p", "likelier < share", "(likelier + ranked <= share) | (likelier == 0)",
     "the sum reaches `share` should stay"),
    ("sampling", "top_p", "kept[order] = ranked", "kept = ranked", "have lost their places"),
    ("sampling", "top_p", "descending=True", "descending=False", "the sum begins with the least likely"),
    ("sampling", "top_p", "kept[order] = ranked", "kept = ranked[order]", "sorts once more"),
    ("sampling", "top_p", "return kept / kept.sum()", "return kept.softmax(-1)", "the softmax of probabilities"),
    ("sampling", "top_p", "return kept / kept.sum()", "return torch.where(kept > 0, kept, -torch.inf).softmax(-1)",
     "the softmax of probabilities"),
    ("sampling", "top_p", "likelier < share", "ranked >= share", "is the sum from the likeliest token on"),
    ("sampling", "top_p", "p.sort(descending=True)", "p, torch.arange(len(p))", "in the order of the tokens"),
    ("sampling", "generate_greedily", "ids[-block_size:]", "ids", "the model got 5 tokens; it takes at most 4"),
    ("sampling", "generate_greedily", "return ids[start:]", "return ids", "without the prompt"),
    ("sampling", "generate_greedily", "logits[0, -1]", "logits[0, 0]", "not of the first"),
    ("sampling", "generate_greedily", "list(ids)", "ids", "the list of the prompt is changed"),
    ("sampling", "generate_greedily", "logits[0, -1].argmax()", "logits[0].argmax()", "over the logits of all places"),
    ("sampling", "generate_greedily", "ids[-block_size:]", "ids[:block_size]", "cut to its start"),
    ("v3_training", "pre_norm_block", "x = x + attention(norm_1(x))\n    return x + mlp(norm_2(x))",
     "x = norm_1(x + attention(x))\n    return norm_2(x + mlp(x))", "this is post-norm"),
    ("v3_training", "pre_norm_block", "x + attention(norm_1(x))", "attention(norm_1(x))", "not right"),
    ("v3_training", "pre_norm_block", "x = x + attention(norm_1(x))\n    return x + mlp(norm_2(x))",
     "x = x + norm_1(attention(x))\n    return x + norm_2(mlp(x))", "it should be applied to its input"),
    ("v3_training", "pre_norm_block", "mlp(norm_2", "mlp(norm_1", "the second LayerNorm is norm_2"),
    ("v3_training", "pre_norm_block", "x = x + attention(norm_1(x))\n    return x + mlp(norm_2(x))",
     "x = x + attention(x)\n    return x + mlp(x)", "the LayerNorms are missing"),
    ("v3_training", "gelu", "x + 0.044715 * x**3", "x", "the term with x^3 is missing"),
    ("v3_training", "gelu", "x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())",
     "x / 2 * (1 + torch.erf(x / math.sqrt(2)))", "with the error function"),
    ("v3_training", "gelu", "math.sqrt(2 / math.pi)", "math.sqrt(2) / math.pi", "the root of both"),
    ("v3_training", "gelu", "x / 2 * ", "x / 2 / ", "belongs above the line"),
    ("v3_training", "dropout", "x / (1 - p)", "x", "what stays is not scaled"),
    ("v3_training", "dropout", "x / (1 - p)", "x / p", "divided by p"),
    ("v3_training", "dropout", "if not training:", "if False:", "outside training nothing is dropped"),
    ("v3_training", "dropout", "random < p", "random >= p", "the other way round"),
    ("v3_training", "dropout", "torch.where(random < p, 0, x / (1 - p))", "x / (1 - p)", "but all is scaled"),
    ("v3_training", "dropout", "random < p", "random.flip(0) < p", "what is dropped is not where"),
    ("v3_training", "lr_factor", "step + 1", "step", "step 0 has a learning rate of 0"),
    ("v3_training", "lr_factor", "(cooldown * max_steps)", "((1 - cooldown) * max_steps + 1e-9)", "in all others"),
    ("v3_training", "lr_factor", "(max_steps - step)", "(max_steps - 1 - step)", "the last step has a learning rate"),
    ("v3_training", "lr_factor", "min(1, ", "min(", "exceeds 1"),
    ("v3_training", "lr_factor", "return min(", "if step < warmup_steps:\n        return (step + 1) / warmup_steps\n"
     "    return min(", "here it is always the rise"),
    ("v3_training", "lr_factor", "return min(", "if step >= max_steps - cooldown * max_steps:\n"
     "        return (max_steps - step) / (cooldown * max_steps)\n    return min(", "here it is always the fall"),
    ("v3_training", "lr_factor", "(cooldown * max_steps)", "max_steps", "it falls from the start on"),
    ("v3_training", "clip_gradients", "max(norm, max_norm)", "norm", "small gradients are scaled up"),
    ("v3_training", "clip_gradients", "[g * factor", "[g * (max_norm / max(g.norm(), max_norm))", "clipped by itself"),
    ("v3_training", "clip_gradients", "square().sum()", "square().mean()", "here their mean is taken"),
    ("v3_training", "adamw_step", "m / (1 - b1**step), v / (1 - b2**step)", "m, v", "the correction of m and v"),
    ("v3_training", "adamw_step", "b1, b2 = betas", "b1, b2 = betas\n    grad = grad + weight_decay * p\n"
     "    weight_decay = 0", "as in Adam with L2"),
    ("v3_training", "adamw_step", "lr * weight_decay", "weight_decay", "the decay should be multiplied by lr"),
    ("v3_training", "adamw_step", "return p, m, v", "return p, corrected_m, corrected_v", "come back corrected"),
    ("v3_training", "adamw_step", "(corrected_v.sqrt() + eps)", "(corrected_v + eps).sqrt()", "outside of the root"),
    ("v3_training", "adamw_step", "m = b1 * m", "m *= b1\n    m = m", "changed in place"),
    ("v3_training", "adamw_step", "grad**2", "grad", "v is the running mean of the square"),
    ("v3_training", "adamw_step", "p = p - lr * corrected_m", "p = p + lr * corrected_m", "p moves the wrong way"),
    ("v3_training", "adamw_step", "corrected_v.sqrt()", "corrected_v", "the root of v is missing"),
    ("v3_training", "adamw_step", "(corrected_v.sqrt() + eps)", "(v.sqrt() + eps) * math.sqrt(1 - b2**step)",
     "v is corrected before its root is taken"),
    ("v3_training", "adamw_step", "b1**step), v / (1 - b2**step)", "b1 * step), v / (1 - b2 * step)", "contains nan"),
    ("v3_training", "weight_decay_groups", "p.dim() == 2", 'name.endswith("weight")', "LayerNorm should not decay"),
    ("v3_training", "weight_decay_groups", "decay, rest\n", "rest, decay\n", "the two lists are exchanged"),
    ("v3_training", "weight_decay_groups", ".append(name)", ".append((name, p))", "names alone"),
    ("v3_training", "weight_decay_groups", "return decay, rest", "return decay, []", "can be walked once only"),
    ("v3_training", "weight_decay_groups", "p.dim() == 2", '"weight" in name and "norm" not in name', "not by names"),
    ("v3_training", "n_parameters", "matrices + vectors) + 2 * C", "matrices + vectors) + 2 * C + vocab_size * C",
     "the last layer is the embedding used again"),
    ("v3_training", "n_parameters", "2 * 2 * C", "2 * C", "2 C numbers too few"),
    ("v3_training", "n_parameters", "vectors) + 2 * C", "vectors)", "the LayerNorm at the end is missing"),
    ("v3_training", "n_parameters", "C + 2 * 2 * C", "C + 4 * C + C", "C numbers too many"),
    ("v3_training", "n_parameters", "4 * C + C + 2 * 2 * C", "4 * C + 2 * 2 * C", "are C numbers too few"),
    ("v3_training", "n_parameters", "3 * C + C + 4 * C", "C + 4 * C", "3 C are missing"),
    ("v3_training", "n_parameters", "3 * C + C + 4 * C", "C + C + C", "a bias for each output"),
    ("v3_training", "windows_that_count", "start, first, stop))", "start, start, stop))", "counts in several windows"),
    ("v3_training", "windows_that_count", "while first < n:", "while start + size <= n:", "predictions are missing"),
    ("v3_training", "windows_that_count", "while first < n:", "while start < n:", "nothing counts"),
    ("v3_training", "windows_that_count", "windows.append((start, first, stop))",
     "windows.append((min(start, max(n - size, 0)), first, stop))", "no window starts at 15"),
    ("v3_training", "windows_that_count", "start + size, n)", "start + stride, n)", "makes predictions up to 3"),
    ("v3_training", "windows_that_count", "start, first, stop))", "start, first, stop - 1))", "its `stop` is 4"),
    ("v3_1_muon", "rms_norm", ".square()", "", "not right"),
    ("v3_1_muon", "rms_norm", "x.square().mean(-1", "x.square().sum(-1", "the squares are added up"),
    ("v3_1_muon", "rms_norm", "return x /", "x = x - x.mean(-1, keepdim=True)\n    return x /", "as in LayerNorm"),
    ("v3_1_muon", "rms_norm", "x.square().mean(-1, keepdim=True)", "x.mean(-1, keepdim=True).square()", "mean is squa"),
    ("v3_1_muon", "rms_norm", "mean(-1, keepdim=True)", "mean(0)", "the mean should be over the last"),
    ("v3_1_muon", "rms_norm", "torch.finfo(x.dtype).eps", "1e-5", "not 1e-5"),
    ("v3_1_muon", "relu_squared", ".relu()", "", "negative numbers should become 0"),
    ("v3_1_muon", "relu_squared", ".square()", "", "the square is missing"),
    ("v3_1_muon", "newton_schulz_round", "-4.7750", "4.7750", "its factor is -4.7750"),
    ("v3_1_muon", "newton_schulz_round", "A = X @ X.mT\n    return 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X",
     "return 3.4445 * X - 4.7750 * X**3 + 2.0315 * X**5", "are products of matrices"),
    ("v3_1_muon", "newton_schulz_round", "A @ A) @ X", "A @ A)", "the last X of each product is missing"),
    ("v3_1_muon", "newton_schulz_round", "(-4.7750 * A + 2.0315 * A @ A) @ X", "X @ (-4.7750 * A + 2.0315 * A @ A)",
     "to the left of X"),
    ("v3_1_muon", "newton_schulz_round", "X @ X.mT", "X @ X", "here it is X X"),
    ("v3_1_muon", "newton_schulz_round", "A @ A", "A * A", "A * A is one of numbers"),
    ("v3_1_muon", "newton_schulz_round", "X @ X.mT", "X.mT @ X", "on the left of X belongs X X'"),
    ("v3_1_muon", "newton_schulz_round", "3.4445 * X + (-4.7750", "(3.4445 - 4.7750", "the term is 3.4445 X"),
    ("v3_1_muon", "orthogonalize", "G / (G.norm() + 1e-7)", "G", "the rounds diverge"),
    ("v3_1_muon", "orthogonalize", "range(5)", "range(4)", "should be five rounds"),
    ("v3_1_muon", "orthogonalize", "G.norm()", "torch.linalg.matrix_norm(G, 2)", "should be the Frobenius norm"),
    ("v3_1_muon", "orthogonalize", "X = newton", "_ = newton", "should go into the next"),
    ("v3_1_muon", "orthogonalize", "G.norm()", "G.square().sum()", "the root is missing"),
    ("v3_1_muon", "orthogonalize", "return X", "U, s, V = torch.linalg.svd(G, full_matrices=False)\n    return U @ V",
     "five rounds come near it only"),
    ("v3_1_muon", "muon_step", "update = momentum * buffer + (1 - momentum) * grad", "update = buffer", "look ahead"),
    ("v3_1_muon", "muon_step", "buffer = momentum * buffer + (1 - momentum) * grad\n    u",
     "buffer = momentum * buffer + grad\n    u", "the buffer is a running mean"),
    ("v3_1_muon", "muon_step", "lr * scale", "lr", "of a tall matrix is missing"),
    ("v3_1_muon", "muon_step", "orthogonalize(update)", "update", "is not orthogonalized"),
    ("v3_1_muon", "muon_step", "max(1, rows / columns)", "(rows / columns)", "it is never below"),
    ("v3_1_muon", "muon_step", "update = momentum * buffer + (1 - momentum) * grad",
     "update = momentum * buffer + grad", "in the update the gradient counts by 1 - momentum"),
    ("v3_1_muon", "muon_step", "update = momentum * buffer + (1 - momentum) * grad",
     "update = momentum * grad + (1 - momentum) * buffer", "the factors of the update are exchanged"),
    ("v3_1_muon", "muon_step", "lr * scale * orthogonalize(update)", "orthogonalize(lr * update)", "lr is lost"),
    ("v3_1_muon", "muon_step", "buffer = momentum * buffer + (1 - momentum) * grad\n    u",
     "buffer = orthogonalize(momentum * buffer + (1 - momentum) * grad)\n    u", "should not be orthogonalized"),
    ("v4_positions", "rope_angles", "-torch.arange(0, D, 2)", "-torch.arange(D // 2)", "it should be -2 i / D"),
    ("v4_positions", "rope_angles", "-torch.arange", "torch.arange", "the exponent should be negative"),
    ("v4_positions", "rope_angles", "-torch.arange(0, D, 2)", "-2 * torch.arange(0, D, 2)", "is 2 i already"),
    ("v4_positions", "rope_angles", " / D", " // D", "it is no integer"),
    ("v4_positions", "rotate", "a, b = x.chunk(2, -1)", "a, b = x[..., ::2], x[..., 1::2]", "neighbours are paired"),
    ("v4_positions", "rotate", "angles.sin()", "-angles.sin()", "turned the other way"),
    ("v4_positions", "rotate", "a, b = x.chunk(2, -1)", "a, b = x.chunk(2, -1)\n    a.copy_(a * angles.cos() - b * "
     "angles.sin())\n    return torch.cat([a, a * angles.sin() + b * angles.cos()], -1)", "keep a copy of x"),
    ("v4_positions", "rotate", "a * sin + b * cos", "a * cos + b * sin", "with both a and b"),
    ("v4_positions", "alibi_slopes", "range(1, n_head + 1)", "range(n_head)", "the slopes start at 1"),
    ("v4_positions", "alibi_slopes", "2 ** (-8 * h / n_head)", "2.0**-h", "whatever H is"),
    ("v4_positions", "alibi_bias", "keys - queries[:, None]", "queries[:, None] - keys", "the sign is wrong"),
    ("v4_positions", "alibi_bias", "torch.arange(K - T, K)", "torch.arange(T)", "the position K - T, not 0"),
    ("v4_positions", "alibi_bias", "torch.arange(K - T, K)", "torch.arange(K - T + 1, K + 1)", "not to K - T + 1"),
    ("v4_positions", "sinusoidal_positions", "angles.sin(), angles.cos()", "angles.cos(), angles.sin()", "the cosines"),
    ("v4_positions", "sinusoidal_positions", "torch.cat([angles.sin(), angles.cos()], -1)",
     "torch.stack([angles.sin(), angles.cos()], -1).flatten(1)", "sines and cosines alternate"),
    ("v4_positions", "sinusoidal_positions", "C, base)", "C, 1 / base)", "the exponent should be negative"),
    ("v4_positions", "attend_with_cache", " / math.sqrt(q.size(-1))", "", "not divided by sqrt(D)"),
    ("v4_positions", "attend_with_cache", "if cache is not None:", "if False:", "the token sees itself alone"),
    ("v4_positions", "attend_with_cache", "return scores.softmax(-1) @ v, (k, v)",
     "return scores.softmax(-1) @ v, (k[:, :, -1:], v[:, :, -1:])", "the cache holds the new token alone"),
    ("v4_positions", "attend_with_cache", "return scores", "scores[..., 1:] -= math.inf\n    return scores",
     "or a mask hides them"),
    ("v4_positions", "attend_with_cache", "q.size(-1)", "k.size(2)", "the root of the number of keys"),
    ("v4_positions", "attend_with_cache", "softmax(-1)", "softmax(-2)", "should run over the keys"),
    ("v4_positions", "attend_with_cache", "[cache[0], k], 2), torch.cat([cache[1], v], 2)",
     "[k, cache[0]], 2), torch.cat([v, cache[1]], 2)", "the new token belongs at the end"),
    ("v4_positions", "attend_with_cache", "scores.softmax(-1)", "scores", "the softmax is missing"),
]  # fmt: skip

# Right answers of another kind: (file, exercise, text of the solution, text that does the same)
RIGHT = [
    ("tokenizer_bpe", "pretokenize", "[A-Za-z]", r"[^\W\d_]"),
    ("tokenizer_bpe", "best_pair", "min(counts, key=lambda pair: (-counts[pair], pair))",
     "list(sorted(counts, key=lambda pair: (-counts[pair], pair))[0])"),
    ("v0_bigram", "softmax", "weights = (logits - logits.amax(-1, keepdim=True)).exp()",
     "logits -= logits.amax(-1, keepdim=True)\n    weights = logits.exp()"),
    ("v0_bigram", "cross_entropy", "return -", "return -1.0 * "),
    ("v1_windows", "batch_of_windows", "return windows[:, :-1], windows[:, 1:]",
     "return [windows[:, :-1].clone(), windows[:, 1:].clone()]"),
    ("v1_1_memory", "loss_in_chunks", "return loss / len(x)", "return float(loss) / len(x)"),
    ("v2_attention", "split_heads", ".unbind(0)", ""),
    ("v2_attention", "layer_norm", "centered = x - x.mean(-1, keepdim=True)",
     "x -= x.mean(-1, keepdim=True)\n    centered = x"),
    ("v2_attention", "post_norm_block", "norm_1(x + attention(x))", "norm_1(x.add_(attention(x)))"),
    ("sampling", "with_temperature", "logits / temperature", "logits.div_(temperature)"),
    ("sampling", "generate_greedily", "return ids[start:]", "return torch.tensor(ids[start:])"),
    ("v3_training", "pre_norm_block", "x = x + attention", "x += attention"),
    ("v3_training", "dropout", "return torch.where(random < p, 0, x / (1 - p))",
     "x[random < p] = 0\n    x /= 1 - p\n    return x"),
    ("v3_training", "adamw_step", "return p, m, v", "return [p, m, v]"),
    ("v3_1_muon", "rms_norm", "return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()",
     "x /= (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()\n    return x"),
    ("v3_1_muon", "muon_step", "return weight - lr * scale * orthogonalize(update), buffer",
     "return [weight - lr * scale * orthogonalize(update), buffer]"),
    ("v4_positions", "alibi_slopes", "return [2 ** (-8 * h / n_head) for h in range(1, n_head + 1)]",
     "return 2 ** (-8 * torch.arange(1, n_head + 1) / n_head)"),
    ("v4_positions", "attend_with_cache", "@ v, (k, v)", "@ v, [k, v]"),
    ("v4_positions", "attend_with_cache", "return scores.softmax(-1) @ v, (k, v)",
     "return [scores.softmax(-1) @ v, torch.stack([k, v])]"),
]  # fmt: skip


def changed(file, exercise, text, other):
    """The solutions of a file, with one text of one of them replaced."""
    source = inspect.getsource(getattr(solutions(file), exercise))
    assert text in source, (exercise, text)
    names = dict(vars(solutions(file)))
    exec(source.replace(text, other), names)
    return Answers(file, exercise, names[exercise])


@pytest.mark.parametrize("file", FILES)
def test_the_solutions_pass(file):
    for exercise in functions(gaps(file)):
        check(file, exercise, solutions(file))


@pytest.mark.parametrize("file", FILES)
def test_other_right_answers_pass(file):
    """Those too that change a tensor in place, or return a list in place of a tuple."""
    for row in RIGHT:
        if row[0] == file:
            check(*row[:2], changed(*row))


@pytest.mark.parametrize("file", FILES)
def test_wrong_answers_are_named(file):
    for exercise, text, wrong, words in [row[1:] for row in WRONG if row[0] == file]:
        answers = changed(file, exercise, text, wrong)
        with pytest.raises(fail.Exception) as failure:
            check(file, exercise, answers)
        assert words in str(failure.value), (exercise, wrong, str(failure.value))


@pytest.mark.parametrize("file", FILES)
def test_a_check_says_what_is_missing(file):
    """A gap is said to be one; a function without `return` gets a sentence, and no error within the check."""
    for exercise in functions(gaps(file)):
        with pytest.raises(NotImplementedError, match="^your turn$"):
            check(file, exercise, Answers(file, exercise, getattr(gaps(file), exercise)))
        with pytest.raises(fail.Exception, match="None: is a `return` missing|should be .* return"):
            check(file, exercise, Answers(file, exercise, lambda *arguments: None))


@pytest.mark.parametrize("file", FILES)
def test_the_examples_in_the_questions_hold(file):
    """They are tried with the solutions."""
    runner = doctest.DocTestRunner(verbose=False)
    for exercise in functions(gaps(file)):
        [question] = doctest.DocTestFinder().find(getattr(gaps(file), exercise), exercise, globs={
            **vars(gaps(file)), **vars(solutions(file))})  # fmt: skip
        assert question.examples, exercise
        said = []
        runner.run(question, out=said.append)
        assert not said, "".join(said)


def test_every_exercise_has_what_belongs_to_it():
    """A question that says where to read, a check, a solution, a wrong answer, and a row in the table."""
    table = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    for file in FILES:
        checks = importlib.import_module(f"exercises.test_{file}")
        assert [f"test_{name}" for name in functions(gaps(file))] == [
            name for name in functions(checks) if name.startswith("test_")]  # fmt: skip
        assert set(functions(gaps(file))) == set(functions(solutions(file)))
    assert {row[:2] for row in WRONG} == set(EXERCISES)
    for file, exercise in EXERCISES:
        assert re.search(rf"(?m)^\| `{exercise}` \|.*\| \d+ \|$", table), exercise
        function, solved = getattr(gaps(file), exercise), getattr(solutions(file), exercise)
        assert inspect.signature(function) == inspect.signature(solved), exercise
        assert "Read: " in function.__doc__, exercise
        [body] = ast.parse(inspect.getsource(function)).body
        assert len(body.body) == 2, f"{exercise}: more than a question and a gap"


def run_pytest(folder, *arguments):
    code = (f"import pytest, sys; sys.path.append({str(ROOT)!r}); "
            f"sys.exit(pytest.main(['-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=', *{arguments}]))")
    return forks.run(["-c", code], cwd=folder)


def test_what_a_learner_sees(tmp_path):
    """A gap, a wrong answer, an error in an answer, a right one, and a syntax error, in a copy of the exercises."""
    copy = tmp_path / "exercises"
    copy.mkdir()
    for name in ("conftest.py", "checking.py", "test_v2_attention.py", "test_sampling.py"):
        shutil.copy(ROOT / "exercises" / name, copy)
    questions = (ROOT / "exercises" / "v2_attention.py").read_text(encoding="utf-8")
    for answer in ("return torch.ones(T, T, dtype=torch.bool).triu(1)", "return x @ w_v", "return qkv.view(3)"):
        questions = questions.replace('raise NotImplementedError("your turn")', answer, 1)
    (copy / "v2_attention.py").write_text(questions, encoding="utf-8")
    (copy / "sampling.py").write_text("def top_k(p, k):\n    return p @\n", encoding="utf-8")
    done = run_pytest(tmp_path, "exercises")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\nv2_attention.py: join_heads, layer_norm, post_norm_block\n" in done.stdout
    assert "2 failed, 1 passed, 4 errors, 3 not yet written" in done.stdout
    assert re.search(r"test_one_head _+\nthe output is not right: \d+ of 24 numbers are wrong", done.stdout)
    error = r"test_split_heads _+\nRuntimeError: shape .*\nin v2_attention.py, line \d+: return qkv.view\(3\)\n"
    assert re.search(error, done.stdout)
    assert re.search(r"test_top_k _+\nSyntaxError: invalid syntax\nin sampling.py, line 2: return p @\n_", done.stdout)
    assert "Hint" not in done.stdout and "compare(" not in done.stdout  # no source of a question or of a check


def test_an_option_checks_the_solutions():
    done = run_pytest(ROOT, "exercises/test_v2_attention.py", "--solutions")
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr
