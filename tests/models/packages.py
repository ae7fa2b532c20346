"""What people train, by the packages that they train it with: rows for `test_packages` and for the table of docs/people.md.

A package is imported when its row is built, so this file is not tied to any.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import Net, param
from cases_huggingface import GPT2, LENGTH, LLAMA, VOCABULARY, made, text
from situations import Situation, classes, numbers, together
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxcurv.errors import (
    ArgumentError,
    CaptureError,
    CustomFunctionError,
    ExtensionError,
    FxcurvError,
    LossError,
    MixedSamplesError,
)

MSE, grad = nn.MSELoss(), torch.autograd.grad


def moved(model: nn.Module) -> nn.Module:
    """Away from the zeros that initialisation leaves, in float64."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


# ---- peft ------------------------------


def lora_of_layers() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return moved(get_peft_model(body, LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.3)))


def lora_of_gpt2() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    drops = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    model = made("gpt2", "GPT2LMHeadModel", "GPT2Config", **GPT2, **drops)
    return moved(
        get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True))
    )


def next_token(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), y.flatten())


# ---- pytorch-crf ------------------------------


class Tagger(nn.Module):
    """A packed LSTM and a conditional random field, which returns each sentence's negative log-likelihood."""

    def __init__(self) -> None:
        from torchcrf import CRF

        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True, bidirectional=True)
        self.emissions, self.field = nn.Linear(4, 3), CRF(3, batch_first=True)

    def forward(self, words: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=words.shape[1])
        mask = torch.arange(words.shape[1]) < lengths.unsqueeze(1)
        return -self.field(self.emissions(h), tags, mask, reduction="none")


def sentences(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 3, 3), torch.tensor([2, 3, 1, 3])[:n], torch.randint(3, (n, 3))


# ---- diffusers ------------------------------


def u_net() -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel

    return moved(
        UNet2DModel(
            sample_size=4, in_channels=1, out_channels=1, block_out_channels=(2, 2), layers_per_block=1, norm_num_groups=2,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), attention_head_dim=2,
        )
    )  # fmt: skip


def noise_error(output: Any, noise: Tensor) -> Tensor:
    return F.mse_loss(output.sample, noise)


def noisy(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 4, 4), torch.randint(100, (n,))


# ---- derivatives inside ------------------------------


def burgers(m: Any, points: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx at points (x, t), and u, which a boundary loss reads."""
    points = points.requires_grad_()
    u = m.net(points)
    (first,) = grad(u.sum(), points, create_graph=True)
    (second,) = grad(first[:, 0].sum(), points, create_graph=True)
    return torch.cat([first[:, 1:] + u * first[:, :1] - 0.01 / torch.pi * second[:, :1], u], 1)


def residual_and_boundary(out: Tensor, u: Tensor) -> Tensor:
    return out[:, 0].square().mean() + (out[:, 1] - u).square().mean()


def critic(m: Any, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    score = m.net(between)
    (g,) = grad(score, between, torch.ones_like(score), create_graph=True)
    return torch.cat([m.net(real), m.net(fake), g.norm(2, dim=1, keepdim=True)], 1)


def wasserstein(out: Tensor) -> Tensor:
    return out[:, 1].mean() - out[:, 0].mean() + 10 * (out[:, 2] - 1).square().mean()


# ---- reinforcement learning ------------------------------


def policy(m: Any, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.tanh(m.body(state))
    mean = m.actor(h)
    return mean, m.log_std.exp().expand_as(mean), m.value(h).squeeze(-1)


def clipped_surrogate(out: tuple[Tensor, ...], rollout: tuple[Tensor, ...]) -> Tensor:
    """PPO with a clipped ratio, a value loss, and an entropy bonus."""
    (mean, std, value), (action, old, advantage, returns) = out, rollout
    pi = Normal(mean, std)
    ratio = (pi.log_prob(action).sum(-1) - old).exp()
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -surrogate.mean() + 0.5 * F.mse_loss(value, returns) - 0.01 * pi.entropy().sum(-1).mean()


def rollout(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 2), torch.randn(n) - 3, torch.randn(n), torch.randn(n)


# ---- whole batches ------------------------------


def towers(m: Any, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    one, other = F.normalize(m.image(image), dim=-1), F.normalize(torch.tanh(m.text(words)), dim=-1)
    logits = m.scale.exp() * one @ other.t()
    return logits, logits.t()


def contrastive(out: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP's loss: every image against all texts of the batch."""
    own = torch.arange(out[0].shape[0])
    return (F.cross_entropy(out[0], own) + F.cross_entropy(out[1], own)) / 2


def covariance(m: Any, x: Tensor) -> Tensor:
    """Of a Gaussian process on learned features."""
    z = torch.tanh(m.features(x))
    squares = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
    return m.scale.exp() * torch.exp(-squares) + m.noise.exp() * torch.eye(len(x))


def marginal_likelihood(k: Tensor, y: Tensor) -> Tensor:
    root = torch.linalg.cholesky(k)
    return 0.5 * y @ torch.cholesky_solve(y.unsqueeze(1), root)[:, 0] + root.diagonal().log().sum()


# ---- quantisation ------------------------------


class Quantised(nn.Module):
    """Weights and activations through PyTorch's fake quantisation, whose derivative is straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            scale = float(2.0**-4)
            w = torch.fake_quantize_per_tensor_affine(layer.weight, scale, 0, -128, 127)
            x = torch.tanh(torch.fake_quantize_per_tensor_affine(F.linear(x, w, layer.bias), scale, 0, -128, 127))
        return x


def observed() -> nn.Module:
    """PyTorch's own module for it, whose observer keeps a running range."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, reduce_range=False)
    return nn.Sequential(nn.Linear(3, 4), fake, nn.Tanh(), nn.Linear(4, 2))


# ---- mixtures of experts ------------------------------


def mixture(experts: str) -> nn.Module:
    return made(
        "mixtral", "MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation=experts,
    )  # fmt: skip


def words(n: int) -> dict[str, Tensor]:
    return text(n)


# ---- graphs ------------------------------


class Graphs(nn.Module):
    """A layer of PyTorch Geometric and a pool, which counts the graphs itself; a sample is a graph."""

    def __init__(self, convolution: str) -> None:
        import torch_geometric.nn as layers

        super().__init__()
        made = {
            "gcn": lambda: layers.GCNConv(3, 4),
            "gat": lambda: layers.GATConv(3, 2, heads=2),
            "sage": lambda: layers.SAGEConv(3, 4),
            "gin": lambda: layers.GINConv(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), train_eps=True),
        }
        self.convolution, self.head, self.pool = made[convolution](), nn.Linear(4, 2), layers.global_mean_pool

    def forward(self, graphs: Any) -> Tensor:
        h = F.dropout(self.convolution(graphs.x, graphs.edge_index).tanh(), 0.3, self.training)
        return self.head(self.pool(h, graphs.batch))


def merged(n: int) -> Any:
    """Rings of several sizes, as a loader of PyTorch Geometric merges them."""
    from torch_geometric.data import Batch, Data

    made = []
    for v in (3, 4, 2, 3)[:n]:
        ends = torch.arange(v)
        made.append(Data(x=torch.randn(v, 3), edge_index=torch.stack([ends, (ends + 1) % v])))
    return Batch.from_data_list(made)


# ---- equations, flows, spikes, symmetries ------------------------------


def solved(m: Any, x: Tensor) -> Tensor:
    """A neural ordinary differential equation, by fourth-order steps."""
    from torchdiffeq import odeint

    h = odeint(lambda t, h: torch.tanh(m.field(h)) * (1 + t), m.into(x), torch.tensor([0.0, 0.5, 1.0]), method="rk4")
    return m.out(h[-1])


def spline_flow() -> nn.Module:
    from zuko.flows import NSF

    return Net(lambda m, x: m.flow().log_prob(x), flow=NSF(2, transforms=1, bins=3, hidden_features=(4,)))


def spikes() -> nn.Module:
    """Leaky neurons, whose spikes have a derivative of their own; the model keeps their membranes as attributes."""
    from snntorch import Leaky
    from snntorch.surrogate import fast_sigmoid

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second, total = m.first.init_leaky(), m.second.init_leaky(), 0.0
        for _ in range(3):
            spike, first = m.first(3 * m.into(x), first)
            _, second = m.second(m.out(spike.to(x.dtype)), second)
            total = total + second
        return total

    neuron = lambda: Leaky(beta=0.9, spike_grad=fast_sigmoid())  # noqa: E731
    return Net(forward, into=nn.Linear(3, 4), first=neuron(), out=nn.Linear(4, 3), second=neuron())


def equivariant() -> nn.Module:
    import e3nn
    from e3nn import o3

    e3nn.set_optimization_defaults(jit_script_fx=False)  # a script is opaque
    product = o3.FullyConnectedTensorProduct("1x0e+1x1o", "1x0e+1x1o", "4x0e+1x1o")
    return Net(lambda m, x: m.out(m.product(x, x)), product=product, out=o3.Linear("4x0e+1x1o", "3x0e"))


# ---- the rows ------------------------------


def row(model: Any, loss: Any, x: Any, y: Any, trains: bool = False, **more: Any) -> Situation:
    return Situation("", model, loss, x, y, "", trains, **more)


def of_graphs(convolution: str) -> Situation:
    return row(
        lambda: Graphs(convolution), F.cross_entropy, merged, lambda n: torch.arange(n) % 2, True,
        options={"sample_index": "batch"}, oracle=CLASSES,
    )  # fmt: skip


def of_mixture(experts: str) -> Situation:
    return row(lambda: mixture(experts), next_token, words, TOKENS, oracle={**CLASSES, "class_dim": -1})


TOKENS = lambda n: torch.randint(VOCABULARY, (n, LENGTH))  # noqa: E731
CLASSES, SQUARES = {"kind": "ce"}, {"kind": "mse"}

# what a row is called: (the package that it needs, the row)
PACKAGES: dict[str, tuple[str, Situation]] = {
    "LoRA of linear layers, by peft": (
        "peft", row(lora_of_layers, nn.CrossEntropyLoss(), numbers(4), classes(), True, oracle=CLASSES),
    ),
    "LoRA of GPT-2, by peft": (
        "peft", row(lora_of_gpt2, next_token, text, TOKENS, True, oracle={**CLASSES, "class_dim": -1}),
    ),
    "packed LSTM tagger with a random field, by pytorch-crf": (
        "torchcrf", row(Tagger, lambda nll: nll.mean(), sentences, None),
    ),
    "diffusion U-Net, by diffusers": ("diffusers", row(u_net, noise_error, noisy, numbers(1, 4, 4), oracle=SQUARES)),
    "GCN, by PyTorch Geometric": ("torch_geometric", of_graphs("gcn")),
    "GAT, by PyTorch Geometric": ("torch_geometric", of_graphs("gat")),
    "SAGE, by PyTorch Geometric": ("torch_geometric", of_graphs("sage")),
    "GIN, by PyTorch Geometric": ("torch_geometric", of_graphs("gin")),
    "mixture of experts: Mixtral, `eager`": ("transformers", of_mixture("eager")),
    "mixture of experts: Mixtral, `grouped_mm`": ("transformers", of_mixture("grouped_mm")),
    "physics-informed net, Burgers' equation": (
        "torch", row(
            lambda: Net(burgers, net=nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))), residual_and_boundary,
            numbers(2), numbers(),
        ),
    ),
    "critic of a WGAN-GP": (
        "torch", row(
            lambda: Net(critic, net=nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))), wasserstein,
            together(numbers(2), numbers(2), lambda n: torch.rand(n, 1)), None,
        ),
    ),
    "PPO with a Gaussian policy": (
        "torch", row(
            lambda: Net(policy, body=nn.Linear(3, 4), actor=nn.Linear(4, 2), value=nn.Linear(4, 1), log_std=param(2)),
            clipped_surrogate, numbers(3), rollout,
        ),
    ),
    "CLIP's loss": (
        "torch", row(
            lambda: Net(towers, image=nn.Linear(3, 2), text=nn.Linear(3, 2), scale=param(1)), contrastive,
            together(numbers(3), numbers(3)), None,
        ),
    ),
    "Gaussian process on learned features": (
        "torch", row(
            lambda: Net(covariance, features=nn.Linear(3, 2), scale=param(1), noise=param(1)), marginal_likelihood, numbers(3),
            numbers(),
        ),
    ),
    "neural differential equation, by torchdiffeq": (
        "torchdiffeq", row(
            lambda: Net(solved, into=nn.Linear(3, 4), field=nn.Linear(4, 4), out=nn.Linear(4, 3)), F.cross_entropy, numbers(3),
            classes(), oracle=CLASSES,
        ),
    ),
    "spline flow, by zuko": ("zuko", row(spline_flow, lambda out: -out.mean(), numbers(2), None)),
    "spiking network, by snntorch": ("snntorch", row(spikes, F.cross_entropy, numbers(3), classes(), oracle=CLASSES)),
    "equivariant tensor product, by e3nn": (
        "e3nn", row(equivariant, F.cross_entropy, numbers(4), classes(), oracle=CLASSES),
    ),
    "quantisation-aware training": ("torch", row(Quantised, MSE, numbers(3), numbers(2), True, oracle=SQUARES)),
    "quantisation-aware training with observers": ("torch", row(observed, MSE, numbers(3), numbers(2), True)),
}  # fmt: skip

# models of many parameters
LARGE = {"diffusion U-Net, by diffusers", *(name for name in PACKAGES if "Mixtral" in name)}
# models that compute norms or a router in float32 on purpose
SINGLE = {name for name in PACKAGES if "Mixtral" in name}

GRAPHS = [name for name in PACKAGES if "PyTorch Geometric" in name]
# families that are refused where samples meet, and where a vector says which row is whose
PER_SAMPLE = ("first order", "sampled", "Jacobian", "Kronecker")
PER_GRAPH = ("sampled", "Jacobian", "Kronecker")

# (row, family) of which a part is there, the sum over samples or the Hessian's
PARTS: set[tuple[str, str]] = {
    ("PPO with a Gaussian policy", "products"), ("Gaussian process on learned features", "products"),
    ("Gaussian process on learned features", "Hessian"),
    *((name, f) for name in ("CLIP's loss", *GRAPHS) for f in ("Gauss-Newton", "Hessian")),
}  # fmt: skip

# (row, family of quantities, as in model_checks.GROUPS) that is refused: (its error, words of the message)
REFUSED: dict[tuple[str, str], tuple[type[FxcurvError], str]] = {
    ("mixture of experts: Mixtral, `eager`", "gradient"): (CaptureError, "(?s)expert_hit.*batched_mm"),
    # transformers' op takes float32 alone, and the oracle is of float64
    ("mixture of experts: Mixtral, `grouped_mm`", "gradient"): (
        ArgumentError,
        "fails on these arguments without fxcurv",
    ),
    ("mixture of experts: Mixtral, `grouped_mm`", "first order"): (
        CustomFunctionError,
        "grouped_mm_fallback.*reads integers",
    ),
    ("quantisation-aware training with observers", "gradient"): (CaptureError, "makes a number of Python's of a value"),
    ("PPO with a Gaussian policy", "Jacobian"): (ExtensionError, "Jacobian needs one output, the model has 3"),
    ("Gaussian process on learned features", "Gauss-Newton"): (MixedSamplesError, "BatchDiagGGNExact"),
    **{
        ("PPO with a Gaussian policy", f): (LossError, "is not convex")
        for f in ("Gauss-Newton", "sampled", "Kronecker")
    },
    **{("Gaussian process on learned features", f): (MixedSamplesError, "unsqueeze") for f in PER_SAMPLE},
    **{("CLIP's loss", f): (MixedSamplesError, r"one @ other.t\(\)") for f in PER_SAMPLE},
    **{(name, f): (ExtensionError, "is not defined with sample_index=") for name in GRAPHS for f in PER_GRAPH},
}


@contextlib.contextmanager
def as_imported() -> Iterator[None]:
    """Packages warn of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
