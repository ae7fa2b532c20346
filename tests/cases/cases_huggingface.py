"""Models of `transformers`, built from tiny configurations with random weights, and called as users call them.

`transformers` is imported when a case is built, so this file is not: `MODELS` is known without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import Case, Parts, labels
from torch import Tensor, nn

MODELS: dict[str, Case] = {}

VOCABULARY, LENGTH = 7, 4


def model(tags: str = "", **oracle: Any) -> Callable[[Callable[[], Parts]], Callable[[], Parts]]:
    """Register the decorated function under its name."""

    def register(make: Callable[[], Parts]) -> Callable[[], Parts]:
        MODELS[make.__name__] = Case(make.__name__, make, 0, frozenset(tags.split()), {"kind": "ce", **oracle})
        return make

    return register


def made(family: str, name: str, configuration: str, **options: Any) -> nn.Module:
    """An instance in eval mode, its parameters and statistics moved away from the special values of initialisation."""
    # a family's own module: the package's lazy one imports what is optional
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    made = getattr(modeling, name)(getattr(configs, configuration)(**options)).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for key, b in made.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                b.add_(torch.rand_like(b))
    return made


def of_logits(output: Any, y: Tensor) -> Tensor:
    """One class per sample."""
    return F.cross_entropy(output.logits, y)


def of_tokens(output: Any, y: Tensor) -> Tensor:
    """One class per token, -100 where none counts."""
    return F.cross_entropy(output.logits.flatten(0, 1), y.flatten())


def text(n: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """Tokens, the last one of the last sample padding.

    Those of a sample differ: two first ones that are equal make equal rows of the Jacobian, so that no root says which
    column is whose.
    """
    mask = torch.ones(n, length, dtype=torch.long)
    mask[-1, -1] = 0
    tokens = torch.stack([1 + torch.randperm(VOCABULARY - 1)[:length] for _ in range(n)])
    return {"input_ids": tokens, "attention_mask": mask}


def language_model(model: nn.Module) -> Parts:
    """The class of every token that is no padding."""
    inputs = text()
    y = labels(2, LENGTH, classes=VOCABULARY)
    return model, of_tokens, inputs, y.masked_fill(inputs["attention_mask"] == 0, -100)


def text_classifier(model: nn.Module, n: int = 3) -> Parts:
    return model, of_logits, text(n), labels(n, classes=2)


def image_classifier(model: nn.Module, size: int, channels: int = 1, n: int = 3) -> Parts:
    return model, of_logits, {"pixel_values": torch.randn(n, channels, size, size)}, labels(n, classes=2)


GPT2 = dict(
    vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=4, n_layer=1, n_head=2, n_inner=6, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
BERT = dict(
    vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5,
    max_position_embeddings=LENGTH, num_labels=2,
)  # fmt: skip
LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=5, max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PATCHES = dict(
    hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5, image_size=4, patch_size=2,
    num_channels=1, num_labels=2,
)  # fmt: skip


@model("tokens tied", class_dim=-1)
def gpt2() -> Parts:
    return language_model(made("gpt2", "GPT2LMHeadModel", "GPT2Config", **GPT2))


@model()
def gpt2_classifier() -> Parts:
    return text_classifier(made("gpt2", "GPT2ForSequenceClassification", "GPT2Config", **GPT2, num_labels=2))


@model()
def bert_classifier() -> Parts:
    return text_classifier(made("bert", "BertForSequenceClassification", "BertConfig", **BERT))


@model("tokens tied", class_dim=-1)
def bert_masked_lm() -> Parts:
    return language_model(made("bert", "BertForMaskedLM", "BertConfig", **BERT))


@model()
def distilbert_classifier() -> Parts:
    options = dict(vocab_size=VOCABULARY, dim=4, n_layers=1, n_heads=2, hidden_dim=5, max_position_embeddings=LENGTH)
    return text_classifier(
        made("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", **options, num_labels=2)
    )


@model("tokens float32_inside", class_dim=-1)
def llama() -> Parts:
    return language_model(made("llama", "LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 2}))


@model("tokens float32_inside", class_dim=-1)
def mistral() -> Parts:
    """Attention in a sliding window."""
    return language_model(made("mistral", "MistralForCausalLM", "MistralConfig", **LLAMA, sliding_window=2))


@model("tokens float32_inside", class_dim=-1)
def qwen3() -> Parts:
    """Norms of queries and keys."""
    return language_model(made("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **LLAMA, head_dim=2))


@model("tokens tied float32_inside", class_dim=-1)
def gemma2() -> Parts:
    """Logits and attention scores capped by tanh."""
    return language_model(made("gemma2", "Gemma2ForCausalLM", "Gemma2Config", **LLAMA, head_dim=2, sliding_window=2))


@model("tokens tied float32_inside", class_dim=-1)
def t5() -> Parts:
    """Encoder and decoder, with relative positions."""
    model = made(
        "t5", "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=5, num_layers=1,
        num_heads=2, relative_attention_num_buckets=4, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )  # fmt: skip
    inputs = {**text(), "decoder_input_ids": text(length=3)["input_ids"]}
    return model, of_tokens, inputs, labels(2, 3, classes=VOCABULARY)


@model("tokens tied float32_inside", class_dim=-1)
def mamba() -> Parts:
    """A state-space model, scanned step by step."""
    return language_model(
        made(
            "mamba", "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=4, state_size=2,
            num_hidden_layers=1, conv_kernel=2, expand=1, time_step_rank=2,
        )
    )  # fmt: skip


@model()
def vit() -> Parts:
    return image_classifier(made("vit", "ViTForImageClassification", "ViTConfig", **PATCHES), 4)


@model("batch_norm")
def resnet() -> Parts:
    model = made(
        "resnet", "ResNetForImageClassification", "ResNetConfig", num_channels=1, embedding_size=2, hidden_sizes=[2, 4],
        depths=[1, 1], layer_type="basic", num_labels=2,
    )  # fmt: skip
    return image_classifier(model, 8)


@model()
def convnext() -> Parts:
    model = made(
        "convnext", "ConvNextForImageClassification", "ConvNextConfig", num_channels=1, patch_size=2, num_stages=2,
        hidden_sizes=[2, 3], depths=[1, 1], num_labels=2,
    )  # fmt: skip
    return image_classifier(model, 8)


@model("draws_in_its_dtype")
def swin() -> Parts:
    """Attention in shifted windows."""
    model = made(
        "swin", "SwinForImageClassification", "SwinConfig", image_size=8, patch_size=2, num_channels=1, embed_dim=4,
        depths=[2], num_heads=[2], window_size=2, mlp_ratio=1.0, num_labels=2,
    )  # fmt: skip
    return image_classifier(model, 8)


@model(kind="mse")
def whisper_encoder() -> Parts:
    model = made(
        "whisper", "WhisperEncoder", "WhisperConfig", num_mel_bins=2, d_model=4, encoder_layers=1,
        encoder_attention_heads=2, encoder_ffn_dim=5, max_source_positions=3,
    )  # fmt: skip

    def loss(output: Any, y: Tensor) -> Tensor:
        return F.mse_loss(output.last_hidden_state, y)

    return model, loss, {"input_features": torch.randn(2, 2, 6)}, torch.randn(2, 3, 4)


@model("tokens float32_inside", class_dim=-1)
def mixtral() -> Parts:
    """A mixture of experts, each token's experts gathered for it (`batched_mm`)."""
    return language_model(mixture("batched_mm"))


def mixture(experts: str) -> nn.Module:
    """The implementations other than `batched_mm` loop over values or sort the tokens of all samples."""
    return made(
        "mixtral", "MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation=experts,
    )  # fmt: skip


for _experts in ("eager", "grouped_mm"):

    def _make_mixture(experts: str = _experts) -> Parts:
        return language_model(mixture(experts))

    _make_mixture.__name__ = f"mixtral_{_experts}"
    model("tokens float32_inside", class_dim=-1)(_make_mixture)
