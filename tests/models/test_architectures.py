"""Individual gradients of many architectures of transformers, against a loop over samples; tiny, with random weights.

Options that a configuration has are taken from `SMALL`, by its own names or those that it maps to its own.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_oracle import compare_individual
from torch import Tensor

import fxcurv
from fxcurv.extensions import KFAC, BatchGrad, DiagGGNMC

transformers = pytest.importorskip("transformers", reason="checks models of transformers, of the extra `models`")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS, LENGTH = 29, 6
SMALL = dict(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, head_dim=8,
    max_position_embeddings=32, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, n_embd=16, n_layer=2, n_head=2, n_positions=32,
)  # fmt: skip
BATCHED = dict(experts_implementation="batched_mm", num_experts_per_tok=1)
STAGES = dict(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])
WAVES = dict(
    conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, apply_spec_augment=False,
)  # fmt: skip
DISENTANGLED = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8)

# what a family is called: (what it is for, options)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: ("CausalLM", {}) for name in (
            "GPTNeoX", "Bloom", "Phi3", "Phi", "Gemma", "Qwen2", "Olmo2", "SmolLM3", "Granite", "Cohere2", "StableLm", "Falcon",
        )
    },
    "OPT": ("CausalLM", dict(ffn_dim=24, word_embed_proj_dim=16)),
    "Gemma3": ("CausalLM", dict(sliding_window=4)),
    "Mpt": ("CausalLM", dict(max_seq_len=32, expansion_ratio=2)),
    "GPTJ": ("CausalLM", dict(rotary_dim=4)),
    "CodeGen": ("CausalLM", dict(rotary_dim=4, n_head=4)),
    "GptOss": ("CausalLM", dict(num_local_experts=2, sliding_window=4, **BATCHED)),
    "Qwen3Moe": ("CausalLM", dict(num_experts=2, moe_intermediate_size=8, **BATCHED)),
    "DeepseekV3": ("CausalLM", dict(
        n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, first_k_dense_replace=1, **BATCHED,
    )),
    "Mamba2": ("CausalLM", dict(num_heads=4, n_groups=1, state_size=4, expand=2, chunk_size=4)),
    "Lfm2": ("CausalLM", dict(full_attn_idxs=[1])),
    "FalconMamba": ("CausalLM", dict(state_size=4, expand=2)),
    **{name: ("SequenceClassification", {}) for name in ("Roberta", "MPNet", "LayoutLM", "IBert")},
    "Electra": ("SequenceClassification", dict(embedding_size=8)),
    "Albert": ("SequenceClassification", dict(embedding_size=8)),
    "DebertaV2": ("SequenceClassification", dict(
        position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, **DISENTANGLED,
    )),
    "Deberta": ("SequenceClassification", DISENTANGLED),
    "XLNet": ("SequenceClassification", dict(d_inner=24)),
    "ModernBert": ("SequenceClassification", dict(global_attn_every_n_layers=2, local_attention=4)),
    "Funnel": ("SequenceClassification", dict(block_sizes=[1, 1], d_head=8, d_inner=24)),
    "ConvBert": ("SequenceClassification", dict(embedding_size=16, conv_kernel_size=3, head_ratio=1)),
    "MobileBert": ("SequenceClassification", dict(embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8)),
    "FNet": ("SequenceClassification", dict(use_tpu_fourier_optimizations=False, tpu_short_seq_length=LENGTH)),
    "Llama4": ("CausalLM", dict(num_local_experts=2, intermediate_size_mlp=24)),
    "BigBird": ("SequenceClassification", dict(attention_type="original_full")),
    **{name: ("ConditionalGeneration", {}) for name in ("Bart", "Pegasus", "MBart", "Blenderbot")},
    "UMT5": ("ConditionalGeneration", dict(d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
    **{name: ("ImageClassification", dict(image_size=16, patch_size=8)) for name in ("DeiT", "Dinov2", "ViTMSN")},
    "Beit": ("ImageClassification", dict(image_size=16, patch_size=8, use_relative_position_bias=True, out_indices=[1, 2])),
    "MobileNetV2": ("ImageClassification", dict(depth_multiplier=0.25, min_depth=4)),
    "MobileViT": ("ImageClassification", dict(
        image_size=32, hidden_sizes=[8] * 3, neck_hidden_sizes=[4] * 6 + [8], num_attention_heads=2,
    )),
    "Segformer": ("ImageClassification", dict(num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8, **STAGES)),
    "RegNet": ("ImageClassification", dict(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, groups_width=4)),
    "PoolFormer": ("ImageClassification", STAGES),
    "Pvt": ("ImageClassification", dict(image_size=32, num_attention_heads=[1] * 4, **STAGES)),
    "FocalNet": ("ImageClassification", dict(
        image_size=16, patch_size=4, embed_dim=8, depths=[1] * 2, focal_levels=[1] * 2, focal_windows=[3] * 2,
    )),
    "Bit": ("ImageClassification", dict(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, num_groups=2)),
    "SwiftFormer": ("ImageClassification", dict(image_size=32, embed_dims=[4, 4, 8, 8], depths=[1] * 4)),
    "Wav2Vec2": ("waves", WAVES),
    "Hubert": ("waves", WAVES),
}  # fmt: skip

# the gradient of what they normalise or route is computed in float32 on purpose
SINGLE = {
    "Phi3", "Gemma", "Gemma3", "Qwen2", "Olmo2", "SmolLM3", "Granite", "Cohere2", "GptOss", "Qwen3Moe", "DeepseekV3", "Mamba2",
    "Lfm2", "FalconMamba", "UMT5", "Deberta", "Llama4",
}  # fmt: skip


def built(name: str) -> torch.nn.Module:
    purpose, options = ARCHITECTURES[name]
    kind = getattr(
        transformers, {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}.get(name, f"{name}Config")
    )
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__annotations__", {}), *kind.attribute_map}
    configuration = kind(**{k: v for k, v in SMALL.items() if k in known} | {"num_labels": 3} | options)
    model = (
        getattr(transformers, name + ("Model" if purpose == "waves" else f"For{purpose}"))(configuration)
        .double()
        .eval()
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(purpose: str, image: int, n: int) -> tuple[Any, Tensor]:
    """(inputs, targets) of n samples."""
    words = torch.randint(3, WORDS, (n, LENGTH))
    if purpose == "CausalLM":
        return words, torch.randint(WORDS, (n, LENGTH))
    if purpose == "ConditionalGeneration":
        return {"input_ids": words, "decoder_input_ids": words[:, 1:]}, torch.randint(WORDS, (n, LENGTH - 1))
    if purpose == "waves":
        return {"input_values": torch.randn(n, 400).double()}, torch.randn(n).double()
    return words if purpose == "SequenceClassification" else torch.randn(n, 3, image, image).double(), torch.randint(
        3, (n,)
    )


def loss(output: Any, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return (output.last_hidden_state.flatten(1).mean(1) - y).square().mean()
    logits = output.logits
    return F.cross_entropy(logits if logits.ndim == 2 else logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_individual_gradients(name: str) -> None:
    """Beside what needs the transposes of all ops, which the first call's check compares with the gradient."""
    torch.manual_seed(0)
    purpose, options = ARCHITECTURES[name]
    model = built(name)
    x, y = batch(purpose, options.get("image_size", 32), 3)
    found = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNMC(), KFAC(weight_sharing="expand")])(x, y)

    def loss_of(k: int) -> Tensor:
        one = {name: v[k : k + 1] for name, v in x.items()} if isinstance(x, dict) else x[k : k + 1]
        return loss(model(**one) if isinstance(one, dict) else model(one), y[k : k + 1])

    compare_individual(found.grad_batch, model, loss_of, 3, 1e-5 if name in SINGLE else 1e-9)


def test_the_documents_list_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    listed = re.search(r"by `tests/models/test_architectures.py`: (.*?)\.\n", text, re.DOTALL)
    assert listed and listed.group(1).replace("\n", " ").split(", ") == sorted(ARCHITECTURES, key=str.lower)
