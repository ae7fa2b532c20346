"""Models of `transformers` against the oracle; without it installed these tests are skipped."""

from __future__ import annotations

import pytest
import torch
from against_oracle import compare_individual
from case_tools import Case
from cases_huggingface import GPT2, LENGTH, LLAMA, MODELS, VOCABULARY, made
from covering import covering
from model_checks import GROUPS, Checked

import fxcurv
from fxcurv.errors import CaptureError, CustomFunctionError, MixedSamplesError
from fxcurv.extensions import BatchGrad

pytest.importorskip("transformers", reason="checks models of transformers, of the extra `models`")

# what the models say of their own code while they are traced
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

REFUSED = {
    "mixtral_eager": (CaptureError, "expert"),
    "mixtral_grouped_mm": (CustomFunctionError, "grouped_mm_fallback"),
}
WORKING = [name for name in MODELS if name not in REFUSED]
# Another model has the same parts, and a minute of second derivatives each is most of this file.
ALIKE = {"swin", "gemma2", "qwen3", "mistral", "distilbert_classifier", "gpt2_classifier", "bert_masked_lm", "resnet"}
FIRST = [g for g in GROUPS if g not in ("Hessian", "products")]
DTYPES = [torch.float64, torch.float32]


def checked(case: Case, groups: list[str], dtype: torch.dtype = torch.float64, training: bool = False) -> None:
    found = Checked(case, groups, dtype, training, debug=True)
    for group in groups:
        found.check(group)


@pytest.mark.parametrize("name", ["gpt2_classifier", "vit"])
def test_some_quantities(name):
    """One model that reads text and one that reads images; the others, and all quantities, are slow."""
    checked(MODELS[name], ["gradient", "first order", "Gauss-Newton"])


def test_factors_in_training():
    """With dropout, in float32."""
    checked(MODELS["bert_classifier"], ["gradient", "Kronecker"], torch.float32, training=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "training"), covering(WORKING, DTYPES, [False, True]))
def test_first_derivatives(name, dtype, training):
    if training and "draws_in_its_dtype" in MODELS[name].tags:
        dtype = torch.float64  # the oracle's: in another dtype, stochastic depth draws other numbers
    if training and "batch_norm" in MODELS[name].tags:
        with pytest.raises(MixedSamplesError, match="batch_norm"):
            checked(MODELS[name], ["first order"], dtype, training)
        checked(MODELS[name], ["gradient"], dtype, training)
    else:
        checked(MODELS[name], FIRST, dtype, training)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKING if name not in ALIKE])
def test_second_derivatives(name):
    checked(MODELS[name], ["Hessian", "products"])


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """Experts chosen by a loop over values; tokens of all samples sorted together."""
    error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        checked(MODELS[name], ["first order"])


# ---- as people call them ------------------------------


def words(n: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (n, length))


def tiny_llama(**options):
    return made("llama", "LlamaForCausalLM", "LlamaConfig", **{**LLAMA, **options})


def tiny_bert(name: str, **options):
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=16
    )
    return made("bert", name, "BertConfig", vocab_size=VOCABULARY, **sizes, **options)


def individually_right(model, loss, x):
    """Fresh, and then again, against a loop over samples."""
    for _ in range(2):
        found = fxcurv.compile(model, loss, [BatchGrad()])(x)
        torch.testing.assert_close(found.loss, loss(model(**x)).detach(), rtol=1e-6, atol=1e-9)
        compare_individual(found.grad_batch, model, lambda k: loss(model(**one_of(x, k))), 3, 1e-5)


def one_of(x, k):
    return {name: t[k : k + 1] if isinstance(t, torch.Tensor) else t for name, t in x.items()}


@pytest.mark.slow
@pytest.mark.parametrize("of", ["hidden_states", "attentions"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_states_that_hooks_collect(name: str, of: str) -> None:
    """transformers collects them by hooks of its own, which a model's first pass installs."""
    torch.manual_seed(0)
    model = (
        tiny_llama(attn_implementation="eager")
        if name == "llama"
        else tiny_bert("BertForMaskedLM", attn_implementation="eager")
    )
    x = {"input_ids": words(3), f"output_{of}": True}

    def loss(output):
        return (
            sum(h.square().flatten(1).mean(1).mean() for h in output[of])
            + output.logits.square().flatten(1).mean(1).mean()
        )

    individually_right(model, loss, x)


@pytest.mark.slow
def test_what_the_first_pass_sets() -> None:
    """The kind of problem that labels tell, in the configuration."""
    torch.manual_seed(0)
    model = tiny_bert("BertForSequenceClassification", num_labels=3)
    assert model.config.problem_type is None
    x = {"input_ids": words(3), "labels": torch.tensor([0, 2, 1])}
    individually_right(model, lambda output: output.loss, x)
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.slow
def test_adapters_of_a_language_model() -> None:
    """The wrapper has the configuration of the model in it, by `__getattr__`."""
    peft = pytest.importorskip("peft", reason="checks adapters of peft, of the extra `models`")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), settings).double().eval()
    x = {"input_ids": words(3)}

    def loss(output):
        return output.logits.square().flatten(1).mean(1).mean()

    individually_right(model, loss, x)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_two_programs_for_all_lengths(family: str) -> None:
    torch.manual_seed(0)
    if family == "t5":
        sizes = dict(vocab_size=VOCABULARY, d_model=8, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=4, d_ff=12)
        model = made("t5", "T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0)
    else:
        model = (
            made("gpt2", "GPT2LMHeadModel", "GPT2Config", **GPT2 | {"n_positions": 8})
            if family == "gpt2"
            else tiny_bert("BertForMaskedLM")
        )
    compiled = fxcurv.compile(model, lambda output: output.loss, [BatchGrad()])
    for length in (5, 4, 6, 3):
        ids = words(2, length)
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        found, loss = compiled(x), model(**x).loss
        for name, g in zip(
            found.grad, torch.autograd.grad(loss, [model.get_parameter(n) for n in found.grad]), strict=True
        ):
            torch.testing.assert_close(found.grad[name], g, rtol=1e-4, atol=1e-5 * g.abs().max().item() + 1e-9)
    assert len(compiled.recompiles) == 1
