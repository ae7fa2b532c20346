"""The report of a program and its picture."""

from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ElementTree

import pytest
import sympy
import torch
from rich.console import Console
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.explain.report import Report, short
from fxcurv.explain.timing import _decisions_of
from fxcurv.extensions import KFAC, BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, Jacobian, SumGradSquared, Variance

EXTENSIONS = [BatchGrad(), SumGradSquared(), Variance(), DiagGGNExact(), DiagGGNMC(mc_samples=2)]
QUANTITIES = ["gradient", *(type(e).__name__ for e in EXTENSIONS)]
N, IN, HIDDEN, OUT = 6, 5, 4, 3


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def program():
    compiled = fxcurv.compile(Unreached(), nn.CrossEntropyLoss(), EXTENSIONS)
    return compiled.lower(torch.randn(N, IN), torch.randint(OUT, (N,)))


@pytest.fixture(scope="module")
def report(program):
    return Report(program)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, OUT))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad(), Variance()])
    path = tmp_path_factory.mktemp("picture") / "graph.svg"
    compiled.lower(torch.randn(N, 1, 6, 6), torch.randint(OUT, (N,))).draw(path)
    return ElementTree.parse(path).getroot()


def test_every_parameter_and_quantity_has_a_row(report, program):
    found = {(row.param, row.extension) for row in report.rows}
    assert found == set(itertools.product(program.params, QUANTITIES))
    assert sum(row.share for row in report.rows) == pytest.approx(1)


def test_rows_say_rule_and_algorithm(report):
    rows = {(row.param, row.extension): row for row in report.rows}
    assert rows["body.0.weight", "BatchGrad"].rule == "contraction"
    assert rows["body.0.weight", "BatchGrad"].algorithm == "materialise"
    assert rows["body.0.weight", "Variance"].algorithm.startswith("as ")
    assert {rows["spare", q].algorithm for q in QUANTITIES} == {"zero: not reached by the loss"}


def test_totals_are_counted(report, program):
    forward = 2 * N * (IN * HIDDEN + HIDDEN * OUT)
    backward = 2 * forward - 2 * N * IN * HIDDEN  # nobody needs the input's gradient
    assert report.totals["forward"].flops == forward
    assert report.plain.flops == forward + backward
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert report.totals["program"].nodes == len(calls)
    parts = [total for stage, total in report.totals.items() if stage != "program"]
    assert report.totals["program"].flops == sum(total.flops for total in parts)


def test_columns(report):
    counts = {name: (count, users) for name, count, users in report.columns}
    # The softmax Hessian has rank C - 1, and no result here shows its columns.
    assert counts["exact"] == (OUT - 1, ("DiagGGNExact",))
    assert counts["sampled"] == (2, ("DiagGGNMC",))
    assert counts["gradient"] == (1, ("gradient", "BatchGrad", "SumGradSquared", "Variance"))


def test_prints(report):
    text = str(report)
    for part in (
        "body.2.bias",
        "contraction",
        "plain gradient",
        "propagate",
        "columns on the V axis",
        "symbolic",
    ):
        assert part in text
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report)
    assert "body.0.weight" in console.export_text()


def images(extensions, positions=8):
    """Large enough that the three reductions of individual gradients come from one op."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8 * (positions - 2) ** 2, OUT)
    )
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions)
    return compiled, torch.randn(N, 2, positions, positions), torch.randint(OUT, (N,))


def without_nodes(program):
    """(parameter, extension) of decisions whose nodes were all merged into earlier ones, which must give their results."""
    found, none = _decisions_of(program), set()
    for k, d in enumerate(program.decisions):
        if any(k in indices for indices in found.values()):
            continue
        none.add((d.param, d.extension))
        for node in torch.utils._pytree.tree_leaves(program.results[d.savefield][d.param]):
            if isinstance(node, torch.fx.Node):
                assert found.get(node) and max(found[node]) < k, f"{d.param} {d.extension}: {node}"
                assert {program.decisions[i].extension for i in found[node]} == {d.extension}
    return none


def test_measured_beside_predicted():
    """Every choice has both times, what extensions compute by themselves too; what has no prediction has neither."""
    extensions = [SumGradSquared(), Variance(), BatchL2Grad(), DiagGGNExact(), KFAC()]
    compiled, x, y = images(extensions)
    state = torch.random.get_rng_state()
    report = compiled.explain(x, y, measure=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    chosen = [row for row in report.rows if row.seconds]
    assert {row.extension for row in chosen} == {"gradient", *(type(e).__name__ for e in extensions)} - {"Variance"}
    none = without_nodes(compiled.lower(x, y))
    # A bias's factor is part of its weight's.
    assert {("0.bias", "KFAC"), ("4.bias", "KFAC")} <= none
    for row in chosen:
        assert (row.measured == 0) == ((row.param, row.extension) in none), row
    assert all(row.measured is None for row in report.rows if not row.seconds)
    text = str(report)
    assert "predicted" in text and "measured" in text and "shared" in text
    assert "measured" not in str(compiled.explain(x, y))


def test_every_emitted_reduction_belongs_to_its_decision():
    """Nodes name decisions of their own parameter and extension, and of all that one op gives."""
    compiled, x, y = images([SumGradSquared(), BatchL2Grad(), KFAC()], positions=32)
    program = compiled.lower(x, y)
    found = _decisions_of(program)
    for node, indices in found.items():
        own = {(program.decisions[k].param, program.decisions[k].extension) for k in indices}
        assert not own or (node.meta["origin"]["param"], node.meta["origin"]["extension"]) in own
    together = [k for k, d in enumerate(program.decisions) if d.algorithm == "together"]
    assert len(together) == 3
    assert tuple(together) in found.values()
    # Other decisions without nodes were merged into the weight's: a bias has the same norms of cotangents.
    assert without_nodes(program) <= {("0.bias", "KFAC"), ("4.bias", "KFAC"), ("4.bias", "BatchL2Grad")}


def test_results_in_reused_memory():
    compiled = fxcurv.compile(nn.Linear(700, 400), nn.MSELoss(), [BatchGrad()])
    x, y = torch.randn(N, 700), torch.randn(N, 400)
    assert compiled.lower(x, y).buffers
    assert compiled.explain(x, y).plain.flops == 2 * 2 * N * 700 * 400
    same = compiled.explain(x, y, measure=True)
    more = compiled.explain(torch.cat([x, x]), torch.cat([y, y]), measure=True)
    for report in (same, more):
        assert {row.extension for row in report.rows if row.measured > 0} == {"gradient", "BatchGrad"}
    assert "measured with" not in str(same)
    assert f"predicted for {N} samples, measured with {2 * N}" in " ".join(str(more).split())


def test_measuring_refuses_wrong_values():
    compiled, x, y = images([BatchL2Grad()])
    with pytest.raises(ArgumentError, match="fails on the inputs"):
        compiled.explain(x, y + 100, measure=True)


def test_batch_size_that_was_fixed():
    model, loss = nn.Linear(IN, OUT), nn.MSELoss()
    one = fxcurv.compile(model, loss, [BatchGrad()]).explain(torch.randn(1, IN), torch.randn(1, OUT))
    assert one.batch.startswith("fixed at 1")
    program = fxcurv.compile(model, loss, [BatchGrad()]).lower(torch.randn(N, IN), torch.randn(N, OUT))
    for symbol in program.batch.symbols:
        program.fake_mode.shape_env.replacements[symbol] = sympy.Integer(N)
    program.program.fixed_by = {"op": "aten.some_op.default", "module": "body"}
    assert Report(program).batch == f"fixed at {N} by aten.some_op.default in module 'body'"


def test_without_a_loss():
    report = fxcurv.compile(nn.Linear(IN, OUT), None, [Jacobian()]).explain(torch.randn(N, IN))
    assert [row.extension for row in report.rows] == ["Jacobian", "Jacobian"]
    assert report.plain.flops == 2 * 2 * N * IN * OUT


def test_ops_without_rule_or_derivative():
    @torch.library.custom_op("fxcurv_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return 2 * x

    double.register_fake(torch.empty_like)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(IN, OUT)

        def forward(self, x):
            return double(self.linear(x)).cosh()

    rules = {torch.ops.fxcurv_test.double.default: fxcurv.Pointwise(d1=lambda x, y: torch.full_like(x, 2))}
    compiled = fxcurv.compile(Net(), nn.MSELoss(), [BatchGrad()], rules=rules)
    report = compiled.explain(torch.randn(N, IN), torch.randn(N, OUT))
    assert report.plain is None
    assert report.fallbacks == ("aten.cosh.default",)
    assert "plain gradient" not in str(report)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (999.6, "1 k"), (4_718_592, "4.72 M")])
def test_short(value, text):
    assert short(value) == text


def texts(svg) -> list[str]:
    return [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_picture_names_everything(picture):
    shown = texts(picture)
    for field, param in itertools.product(["grad", "grad_batch", "variance"], ["0.weight", "0.bias", "4.weight"]):
        assert f"{field}[{param}]" in shown
    for text in (
        "0.weight",
        "4.bias",
        "conv2d (0)",
        "relu backward (1)",
        "loss",
        "output",
        "backward walk",
        "contractions",
    ):
        assert text in shown
    assert not any("getitem" in text or "sym_size" in text for text in shown)


def test_boxes_are_inside_and_apart(picture):
    width, height = float(picture.get("width")), float(picture.get("height"))
    boxes = [
        tuple(float(r.get(k)) for k in ("x", "y", "width", "height"))
        for r in picture.iter("{http://www.w3.org/2000/svg}rect")
        if r.get("rx")
    ]
    assert len(boxes) > 20
    for x, y, w, h in boxes:
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_picture_is_an_svg(program, tmp_path):
    with pytest.raises(ValueError, match=r"\.svg"):
        program.draw(tmp_path / "graph.png")
