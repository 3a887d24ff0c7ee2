"""Learn merges with numpy: the result of bpe_tokenizer.learn_merges in a fraction of the time.

    merges = learn_merges(counts, n_merges)       # counts as from pretokens.count_pretokens

Algorithm 1 of Sennrich et al. 2016 (arXiv:1508.07909) recounts all pairs for every merge. Here the pre-tokens are kept
in arrays with a linked list over them (`_Corpus`), so a merge touches only the places where its pair occurs, and the
counts change only by what it adds and removes.
"""

import heapq

import numpy as np

_PAIR = 1 << 32  # the pair of ids a and b is written as a * _PAIR + b, so that these numbers compare as pairs do


def _totals(keys, weights, bound):
    """(the distinct keys, ascending; the sum of the weights of each, int64). A key whose sum is 0 may be missing.

    keys: (n,) int64, at least 0 and below `bound`; weights: (n,) integers.
    """
    if bound <= 8 * len(keys):  # counting is faster than sorting
        total = np.bincount(keys, weights)
        keys = np.flatnonzero(total)
        return keys, total[keys].astype(np.int64)
    order = np.argsort(keys, kind="stable")  # only because it is faster than the default
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(weights[order], first, dtype=np.int64) if len(first) else np.zeros(0, np.int64)


def every_second(overlaps):
    """Which of the places where a pair occurs are merged: (n,) bool.

    overlaps: (n,) bool, whether each place, from left to right, overlaps the one before it. In a run of overlapping
    places, such as those of aa in aaaa, the first, the third and so on are merged.
    """
    number = np.arange(len(overlaps))
    run = np.maximum.accumulate(np.where(overlaps, 0, number))  # where the run of each place starts
    return (number - run) % 2 == 0


class _Corpus:
    """The distinct pre-tokens of a text, end to end with separators between them, in which pairs are merged.

    ids: (n,) int32, the id at each place, -1 at separators. A merge writes its id at the place of its left token.
    weight: (n,), how often the pre-token of each place occurs; 0 at separators and at places no longer in use.
    left, right: (n,), the nearest places in use on both sides, a linked list.
    places: list of arrays, for each id the places that hold it, ascending, and perhaps some that did.
    The last three have 32-bit numbers if these are large enough, else 64-bit numbers.
    """

    def __init__(self, counts):
        sizes = np.array([len(pretoken) for pretoken in counts], np.int64)
        text = np.frombuffer(b"\0".join([b"", *counts, b""]), np.uint8)
        n, times = len(text), np.array(list(counts.values()), np.int64)
        place = np.int32 if n < 1 << 31 else np.int64
        separators = np.append(0, np.cumsum(sizes + 1))
        order = np.argsort(text, kind="stable").astype(place)
        in_use = np.ones(n, bool)
        in_use[separators] = False
        order = order[in_use[order]]
        ends = np.cumsum(np.bincount(text, minlength=256) - np.eye(1, 256, dtype=np.int64)[0] * len(separators))
        self.places = np.split(order, ends[:-1])
        self.ids = text.astype(np.int32)
        self.weight = np.zeros(n, np.int32 if times.sum() < 1 << 31 else np.int64)
        self.weight[1:] = np.repeat(times.astype(self.weight.dtype), sizes + 1)[: n - 1]
        self.ids[separators], self.weight[separators] = -1, 0
        self.left, self.right = np.arange(-1, n - 1, dtype=place), np.arange(1, n + 1, dtype=place)

    def _weights(self, i, j):
        """How often the pair at places i[k] and j[k] occurs in the text, for each k; 0 if one is a separator."""
        return np.minimum(self.weight.take(i), self.weight.take(j))

    def pair_totals(self):
        """(all distinct pairs, each as a * _PAIR + b; how often each occurs in the text), (m,) int64 both."""
        n_ids, found = len(self.places), []
        in_use = np.flatnonzero(self.weight)
        for i in np.array_split(in_use, len(in_use) // (1 << 20) + 1):
            j = self.right.take(i)
            i, j = i[self.weight.take(j) > 0], j[self.weight.take(j) > 0]
            keys = self.ids.take(i) * np.int64(n_ids) + self.ids.take(j)
            found.append(_totals(keys, self._weights(i, j), n_ids**2))
        keys, total = _totals(*map(np.concatenate, zip(*found)), n_ids**2)
        return keys // n_ids * _PAIR + keys % n_ids, total

    def find(self, a, b):
        """Where merges apply: (places of the left ids, ascending within a merge; the number of the merge of each).

        a, b: (n,) int64, the left and right ids of merges 0 to n - 1. Of overlapping places only `every_second`.
        """
        rarer, some = [], []
        for left, right in zip(a.tolist(), b.tolist()):
            rarer.append(id := left if len(self.places[left]) < len(self.places[right]) else right)
            at = self.places[id]
            if len(at) > 64:
                self.places[id] = at = at[self.ids.take(at) == id]  # without those merged away
            some.append(at)
        rarer, merge = np.array(rarer), np.repeat(np.arange(len(a)), [len(at) for at in some])
        at = np.concatenate(some)
        i = np.where((rarer == a)[merge], at, self.left.take(at))
        fits = (self.ids.take(at) == rarer[merge]) & (self.ids.take(i) == a[merge])
        i, merge = i[fits], merge[fits]
        fits = self.ids.take(self.right.take(i)) == b[merge]
        i, merge = i[fits], merge[fits]
        overlaps = (self.left.take(i[1:]) == i[:-1]) & (merge[1:] == merge[:-1]) & (a == b)[merge[1:]]
        fits = every_second(np.append(np.zeros(min(1, len(i)), bool), overlaps))
        return i[fits], merge[fits]

    def merge(self, a, b, i, merge):
        """Make merges of `a` and `b`, (n,) int64, at places `i` as found by `find`; each gets the next free id.

        Returns (pairs, each as a * _PAIR + b; the change of the count of each), (m,) int64 both. A pair whose count
        falls may occur twice.
        """
        n, first_new = len(a), len(self.places)
        n_ids = first_new + n
        j = self.right[i]
        before, after = self.left[i], self.right[j]
        weight = self.weight[i]
        # Pairs that disappear: what precedes and the left token, unless what precedes is merged too and so counts this
        # pair, and the right token and what follows.
        self.ids[j] = -2
        apart = self.ids[before] != -2
        self.ids[j] = b[merge]
        parts = [(0, merge[apart], before[apart], weight[apart]), (1, merge, after, weight)]
        gone = [(kind * n + k, self.ids[x], np.minimum(w, self.weight[x])) for kind, k, x, w in parts]
        self.ids[i], self.ids[j], self.weight[j] = first_new + merge, -1, 0
        self.right[i], self.left[after] = after, i
        ends = np.cumsum(np.bincount(merge, minlength=n)).tolist()
        self.places += [i[start:end] for start, end in zip([0, *ends], ends)]
        before = self.left[i]
        apart = self.ids[before] < first_new
        parts = [(2, merge[apart], before[apart], weight[apart]), (3, merge, after, weight)]
        come = [(kind * n + k, self.ids[x], np.minimum(w, self.weight[x])) for kind, k, x, w in parts]
        group, other, change = map(np.concatenate, zip(*gone, *come))
        some = change > 0
        keys, change = _totals(group[some] * n_ids + other[some], change[some], 4 * n * n_ids)
        group, other = np.divmod(keys, n_ids)
        kind, k = np.divmod(group, n)
        new = first_new + k
        one = np.choose(kind, [other, b[k], other, new])
        two = np.choose(kind, [a[k], other, new, other])
        lost = np.bincount(merge, weight, minlength=n).astype(np.int64)  # of each merged pair itself
        pairs = np.concatenate([a * _PAIR + b, one * _PAIR + two])
        return pairs, np.concatenate([-lost, np.where(kind < 2, -change, change)])


def learn_merges(counts, n_merges, progress=None):
    """The first `n_merges` merges, a list of (left id, right id). Fewer if every pre-token becomes one token.

    counts: {pre-token as bytes: count}. progress: called with the number of merges so far, after each of them.
    Each merge joins the most frequent pair; among equally frequent pairs, the smallest.

    The next merges are made in one batch while no left id of one is the right id of another. Such merges cannot overlap
    in a pre-token, and no pair that they create comes before one of the batch: a new pair (ab, c) occurs at most as
    often as the old pair (b, c) and has the larger id, so its turn is later, and (b, c) would have ended the batch; the
    same holds for (c, ab) and (c, a). A merge of two equal ids can overlap itself, so it ends the batch.
    Only pairs that occur at least `floor` times are tracked. When they run out, `floor` is lowered and all pairs are
    counted again.
    """
    corpus = _Corpus(counts)
    merges, pair_counts, heap, floor = [], {}, [], None
    while len(merges) < n_merges:
        batch, lefts, rights = [], set(), set()
        while heap and len(merges) + len(batch) < n_merges:
            count, pair = -heap[0][0], heap[0][1]
            if count != pair_counts[pair]:  # the count has fallen since the entry was pushed
                heapq.heapreplace(heap, (-pair_counts[pair], pair))
                continue
            a, b = divmod(pair, _PAIR)
            if count < floor or a in rights or b in lefts:
                break
            heapq.heappop(heap)
            batch.append((a, b))
            lefts.add(a)
            rights.add(b)
            if a == b:
                break
        if not batch:
            if floor == 1:
                break  # every pre-token is a single token
            pairs, total = corpus.pair_totals()
            floor = max(1, (floor or total.max(initial=1)) // 8)
            often = total >= floor
            pair_counts = dict(zip(pairs[often].tolist(), total[often].tolist()))
            heap = [(-count, pair) for pair, count in pair_counts.items()]
            heapq.heapify(heap)
            continue

        a, b = np.array(batch, np.int64).T
        pairs, changes = corpus.merge(a, b, *corpus.find(a, b))
        for pair in batch:
            merges.append(pair)
            if progress:
                progress(len(merges))
        changed = changes != 0
        for pair, change in zip(pairs[changed].tolist(), changes[changed].tolist()):
            if pair in pair_counts:
                pair_counts[pair] += change
            elif change >= floor:
                pair_counts[pair] = change
                heapq.heappush(heap, (-change, pair))
    return merges
