"""Mixed precision policies of `fully_shard`, on two ranks: against one process in the lower dtype, and FSDP's own gradient."""

import pytest
import torch
from processes import each, on_ranks
from subjects import mesh_of, part
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxcurv
from fxcurv.extensions import GGNMP, KFAC, BatchGrad, DiagGGNExact, SumGradSquared, Variance

ASKED = [BatchGrad(), SumGradSquared(), Variance(), DiagGGNExact(), KFAC(2)]
SUMMED = ("grad", "sum_grad_squared", "variance", "diag_ggn_exact")
SIZES = [5, 2]
ROUNDED = 1e-5
"""float32 has eps = 1.2e-7, and no value is behind more than 80 roundings; relative to the largest entry."""


class Careful(nn.Module):
    """A layer that casts its inputs itself, and computes something else where they were cast before."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(4, 3)

    def forward(self, x):
        scale = 1.0 if x.dtype == torch.float64 else 2.0
        return self.own((x * scale).to(self.own.weight.dtype))


def model_of(head=lambda: nn.Linear(4, 3)):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), head()).double()


def data():
    torch.manual_seed(1)
    return torch.randn(7, 3).double(), torch.randint(3, (7,))


def sharded(model, policy, head=None, mesh=None):
    mesh = mesh or mesh_of(2)
    fully_shard(model[2], mesh=mesh, mp_policy=head or policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


class Travels(TorchDispatchMode):
    """The dtypes of what is gathered, of what is reduced and scattered, and of what is added up over a group of replicas."""

    def __init__(self, replicas=""):
        super().__init__()
        self.replicas, self.gathered, self.scattered, self.added = replicas, set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ops = torch.ops._c10d_functional
        if func is ops.all_gather_into_tensor.default:
            self.gathered.add(args[0].dtype)
        if func is ops.reduce_scatter_tensor.default:
            self.scattered.add(args[0].dtype)
        if func is ops.all_reduce.default and args[2] == self.replicas:
            self.added.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def close(got, want, bound=ROUNDED, scale=None):
    limit = bound * (want if scale is None else scale).double().abs().max()
    difference = (got.double() - want.double()).abs().max()
    assert difference <= limit, (difference, limit)


def in_single(rank, reduced=None, shape=(2,)):
    """Parameters in float64, computed with in float32: what a float32 model gives, in the parameters' dtype and placement."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    x, y = data()
    want = fxcurv.compile(model_of().float(), nn.CrossEntropyLoss(), ASKED, check=None)(x.float(), y, seed=7)
    exact = fxcurv.compile(model_of(), nn.CrossEntropyLoss(), check=None)(x, y)
    model = sharded(model_of(), MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=reduced), mesh=mesh)
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), ASKED, mesh=mesh)  # checks itself at the first call
    mine = part(x, SIZES, rank), part(y, SIZES, rank)
    compiled(*mine, seed=7)
    with Travels(mesh.get_group("replicate").group_name if len(shape) > 1 else "") as seen:
        result = compiled(*mine, seed=7)
    assert seen.gathered == {torch.float32}
    assert seen.scattered == {reduced or torch.float32}
    assert len(shape) == 1 or reduced in seen.added
    assert result.loss.dtype == result.output.dtype == torch.float32
    close(result.loss, want.loss)
    far = 0
    for name, p in model.named_parameters():
        for field in SUMMED:
            value = getattr(result, field)[name]
            assert isinstance(value, DTensor) and value.dtype == p.dtype == torch.float64
            assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
            close(value.full_tensor(), getattr(want, field)[name])
        far = max(far, float((result.grad[name].full_tensor() - exact.grad[name]).abs().max()))
    for got, expected in zip(result.whole("kfac")["0.weight"], want.kfac["0.weight"], strict=True):
        close(got, expected)
    assert far > 1e-10, "float64 would be nearer"


def in_replicas(rank):
    """Under HSDP the sums over replicas have the policy's dtype, too."""
    in_single(rank, torch.float64, (2, 1))


def as_fsdp(rank):
    """In bfloat16, the gradient is FSDP's own, up to rounding; sums of squares are returned in the parameters' dtype."""
    x, y = data()
    x, loss = x.float(), nn.CrossEntropyLoss(reduction="sum")
    eps, found = torch.finfo(torch.bfloat16).eps, []
    for reduced, output in ((torch.float32, None), (None, torch.float32)):
        model = sharded(model_of().float(), MixedPrecisionPolicy(torch.bfloat16, reduced, output))
        mine = part(x, SIZES, rank), part(y, SIZES, rank)
        compiled = fxcurv.compile(model, loss, [SumGradSquared(), GGNMP()], mesh=mesh_of(2))
        result = compiled(*mine)
        again = compiled(*mine)
        loss(model(mine[0]), mine[1]).backward()
        exact = fxcurv.compile(model_of(), loss, [BatchGrad(), SumGradSquared()], check=None)(x.double(), y)
        assert result.output.dtype == (output or torch.bfloat16)
        for name, p in model.named_parameters():
            # every op rounds its result by eps / 2 at most: 4 on the way forward, 6 on the way back, and the sums, on both sides
            terms = exact.grad_batch[name].abs().sum(0)
            got, own = result.grad[name], p.grad
            assert got.dtype == own.dtype == torch.float32 and got.placements == own.placements
            close(got.full_tensor(), 2 * own.full_tensor(), 16 * eps, terms)
            close(again.grad[name].full_tensor(), got.full_tensor(), 0)
            squares = result.sum_grad_squared[name]
            assert squares.dtype == torch.float32
            close(squares.full_tensor(), exact.sum_grad_squared[name], 16 * eps)
            found.append(got.full_tensor().tolist())
        v = torch.ones(result.ggn.shape[0])
        assert (result.ggn @ v).dtype == v.dtype
        p.grad = None
    return found


def by_module(rank):
    """A module's own policy, whose inputs are left as they are."""
    x, y = data()
    head = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64, cast_forward_inputs=False)
    model = sharded(model_of(Careful), MixedPrecisionPolicy(), head)
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [Variance()], mesh=mesh_of(2))(
        part(x, SIZES, rank), part(y, SIZES, rank)
    )
    assert result.output.dtype == torch.float64 and result.grad["2.own.weight"].dtype == torch.float64
    alone = model_of(Careful)
    alone[2].own.float()
    want = torch.autograd.grad(nn.CrossEntropyLoss()(alone(x).double(), y), list(alone.parameters()))
    for (name, _), g in zip(alone.named_parameters(), want, strict=True):
        close(result.grad[name].full_tensor(), g)


def everything(rank):
    return each((in_single, as_fsdp, by_module), rank)


@pytest.fixture(scope="module")
def found():
    """For each of two ranks, what every function gave."""
    return on_ranks(2, everything, limit=900)


@pytest.mark.parametrize("what", ["in_single", "as_fsdp", "by_module"])
def test_mixed_precision_of_fully_shard(found, what):
    for ranks in found:
        assert not isinstance(ranks[what], str), ranks[what]


@pytest.mark.slow
def test_sums_over_replicas():
    on_ranks(2, in_replicas)


def test_ranks_have_one_gradient(found):
    one, other = (ranks["as_fsdp"] for ranks in found)
    assert one == other
