"""The benchmarks' pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from measure import Row
from PIL import Image

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
                        panel.scatter(
                            int(row["flops"]) / int(row["bytes"]), float(row["gflops"]), s=36, zorder=3, **style
                        )
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
    if path.suffix == ".png":  # a palette instead of all colours: a quarter of the size
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    print(path)


def ratios(rows: list[Row], problem: str, path: Path) -> None:
    """A group of bars per quantity of one problem: time over the plain gradient's, of fxcurv, BackPACK and the fastest other."""
    rows = [row for row in rows if row["problem"] == problem and row["ratio"] and row["allocator"] == "default"]
    families = {
        "fxcurv": ("fxcurv",),
        "BackPACK": ("backpack",),
        "fastest other": ("func", "curvlinops", "opacus", "asdl"),
    }
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = row["implementation"].partition(":")[0]
        for title in (title for title, members in families.items() if name in members):
            own = found.setdefault(row["quantity"], {})
            own[title] = min(float(row["ratio"]), own.get(title, float("inf")))
    quantities = [quantity for quantity, own in found.items() if len(own) > 1]
    quantities.sort(key=lambda quantity: found[quantity]["fxcurv"])
    figure, panel = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for index, title in enumerate(families):
        bars = [(at, found[quantity][title]) for at, quantity in enumerate(quantities) if title in found[quantity]]
        panel.bar([at + 0.28 * (index - 1) for at, _ in bars], [height for _, height in bars], 0.26, label=title)
    panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(quantities)), quantities, rotation=40, ha="right")
    panel.set_ylabel("time / plain gradient's")
    panel.legend()
    _save(figure, path)


def scaling(rows: list[Row], axes: tuple[str, ...], path: Path) -> None:
    """A row of panels per axis: time, operations and peak; dotted: the power that is expected, from the first point."""
    panels_of = {"median_ms": ("ms", ""), "gflop": ("GFLOP", "expected_gflop"), "peak_mib": ("MiB", "expected_peak")}
    figure, panels = plt.subplots(len(axes), 3, figsize=(13, 3.2 * len(axes)), squeeze=False, layout="constrained")
    colours = plt.colormaps["tab20"].colors
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    for line, axis in zip(panels, axes, strict=True):
        for panel, (column, (unit, expected)) in zip(line, panels_of.items(), strict=True):
            for index, quantity in enumerate(quantities):
                own = [row for row in rows if (row["quantity"], row["axis"]) == (quantity, axis) and row[column]]
                if not own:
                    continue
                x, y = [int(row[axis]) for row in own], [float(row[column]) for row in own]
                panel.plot(x, y, marker=".", linewidth=1, color=colours[index % 20], label=quantity)
                power = int(own[0][expected or "expected_gflop"])
                panel.plot(x, [y[0] * (at / x[0]) ** power for at in x], ":", linewidth=0.8, color=colours[index % 20])
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel(axis)
            panel.set_ylabel(unit)
    for panel, title in zip(panels[0], ("time", "operations of products", "peak of memory"), strict=True):
        panel.set_title(title)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=6)
    _save(figure, path)
