"""What `bpe_tokenizer.BPETokenizer` uses to handle whole corpora and the files of other libraries.

    unicode.py     letters, numbers and white space in one fixed version of Unicode
    pretokens.py   finds and counts the pre-tokens of a corpus
    learn.py       learns merges
    encode.py      encodes texts
    formats.py     reads and writes the files of GPT-2 and Hugging Face

Learning and encoding give exactly the results of the textbook functions in bpe_tokenizer.py, in a fraction of the time;
the tests compare the two. Five ideas make them fast:

1. Natural text repeats itself. Equal pre-tokens get equal numbers (`pretokens.Chunks`), and only distinct ones are
   encoded. Long pre-tokens, such as Chinese sentences, rarely repeat, so they are cut at every place that no token can
   span (`encode.JoinTable`).
2. The remaining work is vectorized. numpy finds all pre-tokens of a block from the classes of its characters
   (`pretokens.gpt2_starts`), looks up all chunks at once, and applies the next merges to all pre-tokens at once.
3. Encoding need not apply merges one after the other. A merge can be applied early if no earlier merge could ever use
   one of its two tokens (`encode.PairTable`), so a few rounds suffice.
4. Learning keeps the pre-tokens in a linked list, so a merge touches only the places where its pair occurs, and
   several merges are made at once when their order cannot matter (`learn.learn_merges`).
5. Memory is bounded: texts are read in blocks, and the table of chunks is emptied when a text does not repeat itself.
"""


def shown(value):
    """`repr(value)`, cut to 80 characters and put on one line, for an error message."""
    return " ".join(repr(value)[:80].split())
