"""How the pictures of this repository look: curves differ in color, marker and line; dark is high; masked is pale blue.

    import matplotlib.pyplot as plt
    plt.rcParams.update(pictures.STYLE)
    axes.plot(x, y, **pictures.curve(0), label="v0")
    axes.imshow(scores, cmap=pictures.heat())
"""

# Colors that people see apart who see no red, no green or no blue (Okabe and Ito 2008, jfly.uni-koeln.de/color), in an
# order in which neighbors differ in grey as well.
COLORS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = "oDs^vPX*"
LINES = ("-", "--", "-.", ":")
MASKED = "#cfe2f3"  # what is masked or missing
STYLE = {"figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
         "axes.axisbelow": True, "lines.markersize": 4, "lines.linewidth": 1.3}  # fmt: skip

# The same curve for the same thing in every picture.
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", "v4, alibi", "v4, rope")
SCHEMES = ("alibi", "rope", "learned", "sinusoidal", "none")


def curve(k):
    """Color, marker and line of the curve number `k`, or of a name of RUNGS or SCHEMES, for `plot`."""
    if isinstance(k, str):
        k = next(names.index(k) for names in (RUNGS, SCHEMES) if k in names)
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": LINES[k % len(LINES)]}


def heat():
    """A map of values to colors, for `imshow`: the higher the darker, NaN (masked) pale blue."""
    from matplotlib import colormaps

    return colormaps["Greys"].with_extremes(bad=MASKED)
