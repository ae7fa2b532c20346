"""The benchmarks' pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from measure import Row

MARKERS = "os^vD<>Pp*hX"


def roofline(rows: list[Row], path: Path) -> None:
    """FLOP/s against arithmetic intensity, a panel per precision; `bench/README.md` says how to read it.

    A colour is a kernel, a marker its shape; filled: fxcurv, hollow: the naive composition, or the kernel's
    reference where that is one.
    """
    rows = [row for row in rows if row["median_ms"] and int(row["flops"])]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    count = max(1, len(dtypes))
    figure, panels = plt.subplots(1, count, figsize=(7 * count, 6), squeeze=False, layout="constrained")
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(row["kernel"] for row in rows))}
    for panel, dtype in zip(panels[0], dtypes, strict=False):
        own = [row for row in rows if row["dtype"] == dtype]
        _roof(panel, own)
        for kernel, colour in colours.items():
            of = [row for row in own if row["kernel"] == kernel]
            for index, shape in enumerate(dict.fromkeys(row["shape"] for row in of)):
                here = {row["implementation"]: row for row in of if row["shape"] == shape}
                naive = here.get("naive") or here.get("reference")
                for row, face in ((naive, "none"), (here.get("fxcurv"), colour)):
                    if row is not None:
                        style = {"marker": MARKERS[index % len(MARKERS)], "facecolors": face, "edgecolors": colour}
                        panel.scatter(int(row["flops"]) / int(row["bytes"]), float(row["gflops"]), s=36, zorder=3, **style)
        panel.set_xlabel("arithmetic intensity: FLOPs / bytes of arguments and result")
        panel.set_ylabel("GFLOP/s")
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], marker="o", linestyle="", color="black", fillstyle="none", label="naive"))
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4 * count)
    _save(figure, path)


def _roof(panel: plt.Axes, rows: list[Row]) -> None:
    """The ceilings as lines that meet at the intensity from which on operations limit."""
    product, copy = (max(float(row[name]) for row in rows) for name in ("ceiling_gflops", "ceiling_gbytes"))
    intensities = [int(row["flops"]) / int(row["bytes"]) for row in rows] + [product / copy]
    low, high = min(intensities) / 2, max(intensities) * 2
    panel.loglog([low, product / copy, high], [low * copy, product, product], color="black", linewidth=1)
    where = rows[0]["cpu"] if rows[0]["device"] == "cpu" else rows[0]["device"]
    panel.set_title(f"{where}, {rows[0]['dtype']}\nmatrix product {product:.3g} GFLOP/s, copy {copy:.3g} GB/s")


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(path)
