"""Draw an emitted graph as an .svg, laid out by forward pass, walk and quantities.

A box is a connected piece of the graph with one origin: one op's forward pass, its step of the walk, or one
quantity of one parameter. Views and sizes are left out. Lanes from left to right: inputs and parameters, the
forward pass downwards, the walk upwards beside it, and a lane per quantity.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import networkx as nx
from torch import SymInt, Tensor, fx

from fxcurv.ir.origin import STAGES, module_path, source_line, stage_of
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program

COLOURS = {
    "input": "#e8e8e8",
    "forward": "#bcd9f5",
    "columns": "#f9dc9c",
    "propagate": "#f7c1a8",
    "extract": "#d9c8ef",
    "select": "#c3e6b6",
}
NAMES = {
    "input": "inputs and parameters",
    **STAGES,
    "extract": "formulas of quantities",
    "select": "contractions",
}
CHARACTER, LONGEST, LINE, GAP, ROW_GAP, MARGIN, TOP = 6.7, 44, 13, 18, 26, 20, 64
FREE = {operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub}
QUIET = {
    "clone",
    "alias",
    "_unsafe_view",
    "sym_size",
    "new_empty",
    "new_zeros",
    "new_ones",
    "scalar_tensor",
    "arange",
}
ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
    'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#555"/></marker></defs>'
)


@dataclass
class Box:
    """One box: its lane and stage, the texts in it, and its place."""

    stage: str
    lane: str
    lines: list[str]
    key: tuple = ()
    row: float = 0.0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    members: list[fx.Node] = field(default_factory=list)

    @property
    def height(self) -> float:
        """Its height in pixels."""
        return LINE * len(self.lines) + 10


def draw(program: Program, path: str | Path) -> None:
    """Draw the emitted graph of `program` to `path`.

    Raises:
        ValueError: if `path` does not end in .svg.
    """
    if Path(path).suffix != ".svg":
        raise ValueError(f"draw writes .svg files, not {path}")
    graph = _boxes(program)
    lanes = _place(graph)
    Path(path).write_text(_svg(graph, lanes), encoding="utf-8")


# from nodes to boxes ----------------------------------------------------------------------------------------


def _boxes(program: Program) -> nx.DiGraph:
    """The quotient of the graph by origin, without boxes that compute nothing."""
    keys = {n: _key(n) for n in program.graph.nodes if n.op != "output"}
    edges = [(i, n) for n in keys for i in n.all_input_nodes]
    inside = nx.Graph()
    inside.add_nodes_from(keys)
    inside.add_edges_from((i, n) for i, n in edges if keys[i] == keys[n])
    group = {n: k for k, piece in enumerate(nx.connected_components(inside)) for n in piece}
    quotient = nx.DiGraph()
    quotient.add_nodes_from(dict.fromkeys(group[n] for n in keys))
    quotient.add_edges_from((group[i], group[n]) for i, n in edges if group[i] != group[n])
    pieces = nx.condensation(quotient)  # origins that need each other become one box
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for n in keys:
        members[pieces.graph["mapping"][group[n]]].append(n)
    labels = _results(program)
    boxes = {k: _box(program, keys[nodes[0]], nodes, labels) for k, nodes in members.items()}
    return _without_quiet(pieces, boxes, labels)


def _key(node: fx.Node) -> tuple:
    """(stage, op, module, source line, parameter, quantity): nodes that agree, and touch, share a box."""
    origin = node.meta.get("origin", {})
    if node.op in ("placeholder", "get_attr"):
        return ("input", node.name)
    op = origin.get("op") or str(node.target)
    stage = origin.get("stage", "forward")
    stage = stage if stage in COLOURS else stage_of(node)
    stage = "extract" if stage == "results" else stage
    module, quantity = origin.get("module") or module_path(node), origin.get("extension", "")
    line = "" if quantity else source_line(origin.get("stack_trace") or node.meta.get("stack_trace") or "")
    return (stage, op, module, line, origin.get("param", ""), quantity)


def _results(program: Program) -> dict[fx.Node, list[str]]:
    """node -> names of the results that it is."""
    out: dict[fx.Node, list[str]] = defaultdict(list)
    for k, node in enumerate(program.output_leaves):
        out[node].append("output" if len(program.output_leaves) == 1 else f"output {k}")
    if program.loss is not None:
        out[program.loss].append("loss")
    for name, node in program.mutations.items():
        out[node].append(name)
    for name, node in program.extras.items():
        out[node].append(name)
    for savefield, values in program.results.items():
        for param, value in values.items():
            for node in pytree.tree_leaves(value):
                out[node].append(f"{savefield}[{param}]")
    return out


def _box(program: Program, key: tuple, nodes: list[fx.Node], labels: dict[fx.Node, list[str]]) -> Box:
    stage = key[0]
    named = [text for n in nodes for text in labels.get(n, [])]
    if stage == "input":
        index = [n for n in program.graph.nodes if n.op == "placeholder"]
        bound = program.inputs[index.index(nodes[0])] if nodes[0].op == "placeholder" else None
        title = (bound.name or bound.kind) if bound else "constant"
        return Box(stage, "inputs", [title, _shape(program, nodes[0])], key, members=nodes)
    busy = [_node_name(n) for n in nodes if not _is_quiet(n)]
    ops = list(dict.fromkeys(busy))
    fit = max(k for k in (1, 2, 3) if k == 1 or len(", ".join(ops[:k])) <= 26)
    shown = ", ".join(ops[:fit]) + (f" +{len(ops) - fit}" if len(ops) > fit else "")
    op, module = _op_name(key[1]), key[2]
    if stage in ("select", "extract"):
        lane = key[5] or "other"
        lines = [*(named or [module or op]), shown]
    else:
        lane = "forward" if stage == "forward" else "walk"
        kind = {"forward": "", "columns": " columns", "propagate": " backward"}[stage]
        kind = "" if " " in op else kind  # a phrase says it already
        lines = [f"{op}{kind}" + (f" ({module})" if module else ""), *named, shown if shown != op else ""]
    last = [n for n in nodes if any(u not in nodes for u in n.users)] or nodes
    lines.append(_shape(program, last[-1]))
    return Box(stage, lane, [line for line in lines if line], key, members=nodes)


def _node_name(node: fx.Node) -> str:
    return _op_name(str(node.target)) if node.op == "call_function" else node.name


def _op_name(target: str) -> str:
    """aten.conv2d.default -> conv2d."""
    parts = target.split(".")
    return parts[1] if len(parts) == 3 else target


def _is_quiet(node: fx.Node) -> bool:
    """Whether a node only moves or describes data."""
    if node.op != "call_function" or node.target in FREE:
        return node.op == "call_function"
    return bool(getattr(node.target, "is_view", False)) or _node_name(node) in QUIET


def _shape(program: Program, node: fx.Node) -> str:
    val = node.meta.get("val")
    val = val[0] if isinstance(val, tuple | list) else val
    if not isinstance(val, Tensor):
        return ""
    return "[" + ", ".join(_size(program, s) for s in val.shape) + "]"


def _size(program: Program, s: Any) -> str:
    if not isinstance(s, SymInt):
        return str(s)
    text = str(s.node.expr)
    for symbol in program.batch.symbols:
        text = text.replace(str(symbol), "N")
    return text.replace("*", " ")


def _without_quiet(pieces: nx.DiGraph, boxes: dict[int, Box], labels: dict[fx.Node, list[str]]) -> nx.DiGraph:
    """Drop boxes of views and sizes, and connect what those of views read with their readers."""
    graph = nx.DiGraph(pieces.edges)
    graph.add_nodes_from(boxes)
    for k, box in boxes.items():
        kept = box.stage == "input" or any(not _is_quiet(n) or n in labels for n in box.members)
        if not kept:
            sizes_only = not any(isinstance(n.meta.get("val"), Tensor) for n in box.members)
            if not sizes_only:
                graph.add_edges_from((a, b) for a in graph.predecessors(k) for b in graph.successors(k))
            graph.remove_node(k)
    unused = [k for k in graph if boxes[k].stage == "input" and not graph.degree(k)]
    graph.remove_nodes_from(unused)
    nx.set_node_attributes(graph, {k: boxes[k] for k in graph}, "box")
    return graph


# layout -----------------------------------------------------------------------------------------------------


def _place(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Set rows and coordinates; returns lane -> (left, right)."""
    box = graph.nodes(data="box")
    _rows(graph)
    lanes: dict[str, list[int]] = defaultdict(list)
    for k in nx.topological_sort(graph):
        lanes[box[k].lane].append(k)
    order = sorted(lanes, key=lambda lane: {"inputs": 0, "forward": 1, "walk": 2, "gradient": 3}.get(lane, 4))
    cells = {lane: _cells(graph, lanes[lane]) for lane in order}
    heights: dict[float, float] = defaultdict(float)
    for lane in order:
        for row, members in cells[lane].items():
            sizes = [box[k].height for k in members]
            stacked = sum(sizes) + GAP / 2 * (len(sizes) - 1)
            heights[row] = max(heights[row], max(sizes) if _side_by_side(lane) else stacked)
    tops, y = {}, float(TOP + 30)
    for row in sorted(heights):
        tops[row] = y
        y += heights[row] + ROW_GAP
    spans, x = {}, float(MARGIN)
    for lane in order:
        longest = max(len(line) for k in lanes[lane] for line in box[k].lines)
        for k in lanes[lane]:
            box[k].width = CHARACTER * min(longest, LONGEST) + GAP
        wide = max(map(len, cells[lane].values())) if _side_by_side(lane) else 1
        right = x + wide * (box[lanes[lane][0]].width + GAP) - GAP
        for row, members in cells[lane].items():
            _place_cell(graph, members, (x + right) / 2, tops[row], heights[row])
        spans[lane] = (x, right)
        x = spans[lane][1] + 3 * GAP
    return spans


def _side_by_side(lane: str) -> bool:
    return lane in ("forward", "walk")


def _place_cell(graph: nx.DiGraph, members: list[int], middle: float, top: float, height: float) -> None:
    """Set the coordinates of one cell: side by side and centred, or one below the other."""
    boxes = [graph.nodes[k]["box"] for k in members]
    if _side_by_side(boxes[0].lane):
        x = middle - sum(b.width + GAP for b in boxes) / 2 + GAP / 2
        for b in boxes:
            b.x, b.y = x, top + (height - b.height) / 2
            x += b.width + GAP
        return
    y = top + (height - sum(b.height + GAP / 2 for b in boxes) + GAP / 2) / 2
    for b in boxes:
        b.x, b.y = middle - b.width / 2, y
        y += b.height + GAP / 2


def _rows(graph: nx.DiGraph) -> None:
    """Set rows: forward boxes by topological generation, walk boxes beside their op, the rest by parameter."""
    box = graph.nodes(data="box")
    forward = [k for k in nx.topological_sort(graph) if box[k].stage == "forward"]
    lanes: dict[tuple, list[float]] = defaultdict(list)
    for row, generation in enumerate(nx.topological_generations(graph.subgraph(forward))):
        for k in generation:
            box[k].row = row
    for k in forward:
        lanes[box[k].key[1:4]].append(box[k].row)
    for k in nx.topological_sort(graph):
        near = [box[i].row for i in graph.predecessors(k) if box[i].stage in ("columns", "propagate")]
        if box[k].stage in ("columns", "propagate"):
            mine = lanes.get(box[k].key[1:4], [])
            fits = [row for row in mine if not near or row <= max(near)]  # of several calls, the last not yet passed
            box[k].row = max(fits or mine or near or [len(forward)])
            if len(mine) > 1 and box[k].row in mine and box[k].stage == "propagate":
                mine.remove(box[k].row)
    at: dict[str, float] = {}
    for k in graph:
        if box[k].stage == "input":
            readers = [box[j].row for j in graph.successors(k)]
            first = [box[j].row for j in graph.successors(k) if box[j].stage == "forward"]
            box[k].row = at[box[k].lines[0]] = min(first or readers or [0])
    for k in nx.topological_sort(graph):
        if box[k].stage in ("select", "extract"):
            near = [box[i].row for i in graph.predecessors(k) if box[i].stage != "input"]
            box[k].row = at.get(box[k].key[4], min(near or [0]))


def _cells(graph: nx.DiGraph, lane: list[int]) -> dict[float, list[int]]:
    """Row -> boxes, in the order of the barycentres of their neighbours' positions."""
    box = graph.nodes(data="box")
    rank = {k: place for place, k in enumerate(nx.topological_sort(graph))}
    params = {(b.lines[0],): place for place, (_, b) in enumerate(box) if b.stage == "input"}
    cells: dict[float, list[int]] = defaultdict(list)
    for k in lane:
        cells[box[k].row].append(k)

    def barycentre(k: int) -> float:
        near = [rank[i] for i in graph.predecessors(k) if box[i].stage != "input"] or [rank[k]]
        return sum(near) / len(near)

    def position(k: int) -> tuple:
        return (barycentre(k), rank[k]) if _side_by_side(box[k].lane) else (params.get(box[k].key[4:5], -1), rank[k])

    return {row: sorted(members, key=position) for row, members in cells.items()}


# picture ----------------------------------------------------------------------------------------------------


def _svg(graph: nx.DiGraph, lanes: dict[str, tuple[float, float]]) -> str:
    boxes = [box for _, box in graph.nodes(data="box")]
    width = max(right for _, right in lanes.values()) + MARGIN
    height = max((b.y + b.height for b in boxes), default=TOP) + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        ARROW,
        *_legend({b.stage for b in boxes}),
    ]
    for lane, (left, right) in lanes.items():
        out.append(_text((left + right) / 2, TOP + 14, lane, bold=True))
    out += [_edge(graph.nodes[a]["box"], graph.nodes[b]["box"]) for a, b in graph.edges]
    for b in boxes:
        out += _rectangle(b)
    return "\n".join([*out, "</svg>", ""])


def _legend(stages: set[str]) -> list[str]:
    out = []
    x = MARGIN
    for stage, colour in COLOURS.items():
        if stage in stages:
            out.append(f'<rect x="{x}" y="{MARGIN}" width="14" height="14" fill="{colour}" stroke="#555"/>')
            out.append(_text(x + 20, MARGIN + 11, NAMES[stage], anchor="start"))
            x += 40 + 6 * len(NAMES[stage])
    return out


def _rectangle(b: Box) -> list[str]:
    out = [
        f'<rect x="{b.x:.1f}" y="{b.y:.1f}" width="{b.width:.1f}" height="{b.height:.1f}" rx="4" '
        f'fill="{COLOURS[b.stage]}" stroke="#555" stroke-width="0.8"/>'
    ]
    for k, line in enumerate(b.lines):
        shown = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
        out.append(_text(b.x + b.width / 2, b.y + LINE * (k + 1), shown, bold=k == 0))
    return out


def _text(x: float, y: float, text: str, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _edge(a: Box, b: Box) -> str:
    """A curve from box to box: down or up inside a lane, sideways between lanes."""
    strong = a.lane == b.lane and _side_by_side(a.lane)
    style = 'stroke="#222" stroke-width="1.4"' if strong else 'stroke="#888" stroke-width="0.8" stroke-opacity="0.55"'
    if a.lane == b.lane and not _side_by_side(a.lane):
        y1, y2 = a.y + a.height / 2, b.y + b.height / 2
        x1 = x2 = a.x
        curve = f"{x1 - GAP:.1f},{y1:.1f} {x2 - GAP:.1f},{y2:.1f} {x2:.1f},{y2:.1f}"
    elif a.lane == b.lane and abs(a.y - b.y) > 1:
        down = b.y > a.y
        x1, y1 = a.x + a.width / 2, a.y + a.height if down else a.y
        x2, y2 = b.x + b.width / 2, b.y if down else b.y + b.height
        bend = (y2 - y1) / 2
        curve = f"{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2:.1f}"
    else:
        right = b.x > a.x
        x1, y1 = a.x + (a.width if right else 0), a.y + a.height / 2
        x2, y2 = b.x + (0 if right else b.width), b.y + b.height / 2
        bend = (x2 - x1) / 2
        curve = f"{x1 + bend:.1f},{y1:.1f} {x2 - bend:.1f},{y2:.1f} {x2:.1f},{y2:.1f}"
    return f'<path d="M {x1:.1f},{y1:.1f} C {curve}" fill="none" {style} marker-end="url(#arrow)"/>'
