"""How the pictures of this repository look: curves differ in color, marker and line; dark is high; masked is pale blue.

    import matplotlib.pyplot as plt
    plt.rcParams.update(pictures.STYLE)
    axes.plot(x, y, **pictures.curve("v2"), label="v2")
    pictures.seeds(axes, x, [[1.50, 1.52], [1.40, 1.43]], **pictures.curve(0))
    axes.imshow(weights, cmap=pictures.heat())
    axes.imshow(difference, cmap=pictures.change(), vmin=-limit, vmax=limit)
"""

# Colors that people see apart who see no red, no green or no blue (Okabe and Ito 2008, jfly.uni-koeln.de/color), in an
# order in which neighbors differ in grey as well.
COLORS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = "oDs^vPX*"
LINES = ("-", "--", "-.", ":")
MASKED = "#cfe2f3"  # what is masked or missing
BARS = ({"facecolor": "0.35", "edgecolor": "black"}, {"facecolor": "white", "edgecolor": "black", "hatch": "///"},
        {"facecolor": "0.8", "edgecolor": "black"})  # of bars side by side  # fmt: skip
STYLE = {"figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
         "axes.axisbelow": True, "image.interpolation": "nearest", "lines.markersize": 4, "lines.linewidth": 1.3,
         "legend.fontsize": 8, "hatch.linewidth": 0.6}  # fmt: skip

# The same curve for the same thing in every picture. Rungs from the last to the first, so that v4 with a scheme has the
# curve of that scheme, and v3_1 that of learned positions.
RUNGS = ("v4, alibi", "v4, rope", "v3_1", "v3", "v2", "v1_1", "v1", "v0")
SCHEMES = ("alibi", "rope", "learned", "sinusoidal", "none")
NUMBERS = {name: k for names in (RUNGS, SCHEMES) for k, name in enumerate(names)}


def curve(k):
    """Color, marker and line of the curve number `k`, or of a name of RUNGS or SCHEMES, for `plot`."""
    k = NUMBERS[k] if isinstance(k, str) else k
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": LINES[k % len(LINES)]}


def seeds(axes, xs, values, **style):
    """Plot the mean of each list of `values`, those of the seeds at one x, and a bar from the lowest to the highest."""
    means = [sum(one) / len(one) for one in values]
    below = [mean - min(one) for mean, one in zip(means, values)]
    above = [max(one) - mean for mean, one in zip(means, values)]
    return axes.errorbar(xs, means, [below, above], capsize=2, elinewidth=1, **style)


def heat():
    """A map of values to colors, for `imshow`: the higher the darker, NaN (masked) pale blue."""
    from matplotlib import colormaps

    return colormaps["Greys"].with_extremes(bad=MASKED)


def change():
    """A map for differences, with limits -x and x: white is no change, orange more, purple less, NaN pale blue."""
    from matplotlib import colormaps

    return colormaps["PuOr_r"].with_extremes(bad=MASKED)


def label_cells(axes, values, text, dark):
    """Write `text(value)` on each cell of a matrix that is not NaN, in white where `dark(value)`."""
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                axes.text(j, i, text(value), ha="center", va="center", fontsize=8,
                          color="white" if dark(value) else "black")  # fmt: skip
