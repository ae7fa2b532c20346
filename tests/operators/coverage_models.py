"""Which models: every model x every quantity x {float32, float64} x {eval, training}, against the oracle.

    python tests/operators/coverage_models.py --jobs 4 --results coverage.json       # hours on two cores; may be stopped, goes on
    python tests/operators/coverage_models.py --models gpt2 vit --modes float64-eval
    python tests/operators/coverage_models.py --results coverage.json --write # the table in docs/models.md, of what has run
    python tests/operators/coverage_models.py --attention                     # its last column alone, anew: minutes

Needs `transformers` (the extra `models`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"

ROWS = {
    "GPT-2, language model": "gpt2",
    "GPT-2, classification": "gpt2_classifier",
    "BERT, classification": "bert_classifier",
    "BERT, masked language model": "bert_masked_lm",
    "DistilBERT, classification": "distilbert_classifier",
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen3": "qwen3",
    "Gemma 2": "gemma2",
    "Mixtral, `batched_mm` experts": "mixtral",
    "Mixtral, `eager` experts": "mixtral_eager",
    "T5": "t5",
    "Mamba": "mamba",
    "ViT": "vit",
    "Swin": "swin",
    "ResNet": "resnet",
    "ConvNeXt": "convnext",
    "Whisper, encoder": "whisper_encoder",
    "`Transformer`": "transformer",
    "`MultiheadAttention`, padding": "multihead_attention_inputs",
    "`MultiheadAttention`, masks, `need_weights`": "multihead_attention_masks",
    "`LSTM`, 2 layers, bidirectional, projections": "lstm_two_layers_bidirectional_projected",
    "`GRU`, 2 layers, bidirectional": "gru_two_layers_bidirectional",
    "`RNN`, 2 layers, bidirectional": "rnn_relu_two_layers_bidirectional",
    "`EmbeddingBag`, sum": "embedding_bag_sum",
    "`EmbeddingBag`, mean": "embedding_bag_mean",
    "`EmbeddingBag`, max": "embedding_bag_max",
    "`Bilinear`": "bilinear",
    "`PixelShuffle`": "pixel_shuffle",
    "`Upsample`, bilinear": "upsample_bilinear",
    "`interpolate`, bicubic": "interpolate_bicubic",
    "`Unfold`, `Fold`": "unfold_fold",
    "weight norm": "weight_norm_conv",
    "spectral norm": "spectral_norm",
    "LoRA, frozen base": "low_rank_adapter",
    "adapters in a frozen transformer": "adapters_in_a_transformer",
    "graph convolution": "graph_convolution",
    "message passing": "message_passing",
}
MODES = [f"{dtype}-{mode}" for dtype in ("float64", "float32") for mode in ("eval", "train")]
# in float64 and eval mode alone: their oracle is a derivative per parameter entry
SECOND = ("Hessian", "products")


def jobs_of(models: list[str], modes: list[str], second: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """(case, mode, groups): groups share a program."""
    from model_checks import GROUPS

    first = tuple(g for g in GROUPS if g not in SECOND)
    found = [(model, mode, first) for mode in modes for model in models]
    return found + [(model, MODES[0], SECOND) for model in models if second]


def run(job: tuple[str, str, tuple[str, ...]]) -> dict[str, str]:
    """Group -> "right", "refused: ..." or "wrong: ..."; together, and one by one where together raises."""
    import torch

    torch.set_num_threads(1)
    case, mode, groups = job
    found = _checked(case, mode, groups)
    if len(groups) > 1 and set(found.values()) != {"right"}:
        for group in groups:
            if not found[group].startswith(("right", "wrong")):
                found.update(_checked(case, mode, (group,)))
    return found


def _checked(case: str, mode: str, groups: tuple[str, ...]) -> dict[str, str]:
    import torch
    from cases import CASES
    from cases_huggingface import MODELS
    from model_checks import Checked

    from fxcurv.errors import FxcurvError

    dtype, _, state = mode.partition("-")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = {**CASES, **MODELS}[case]
            checked = Checked(model, groups, getattr(torch, dtype), state == "train")
    except FxcurvError as error:
        return dict.fromkeys(groups, f"refused: {type(error).__name__}: {error}")
    except Exception as error:  # a row of its own in the table, which is to show it
        return dict.fromkeys(groups, f"wrong: {type(error).__name__}: {error}")
    found = {}
    for group in groups:
        try:
            left = checked.check(group)
            found[group] = f"right, no oracle for {', '.join(left)}" if left else "right"
        except Exception as error:
            found[group] = f"wrong: {type(error).__name__}: {error}"
    return found


# ---- what became of attention ------------------------------

ATTENTION = "attention"


def attention(case: str) -> str:
    """What the program of first-order quantities has for attention, as the report says it: in 64 bits and eval mode."""
    import torch
    from cases import CASES
    from cases_huggingface import MODELS

    import fxcurv
    from fxcurv.errors import FxcurvError
    from fxcurv.extensions import BatchGrad

    torch.manual_seed(0)
    described = {**CASES, **MODELS}[case]
    model, loss, inputs, targets = described.build(torch.float64)
    compiled = fxcurv.compile(model.eval(), loss, [BatchGrad()], batch_dim=described.batch_dim, check=None)
    try:
        program = compiled.lower(inputs, targets, after="fuse").program
    except FxcurvError:  # the other columns say why
        return "–"
    found = [why for op, _, why in program.analysis.said if op == "scaled_dot_product_attention"]
    kernels = [f"fused ({found.count('')})"] if "" in found else []
    others = [f"mathematics ({found.count(why)}): {why}" for why in dict.fromkeys(found) if why]
    own = [] if found else [f"its own softmax ({n})" for n in [_softmaxes(program)] if n]
    return "; ".join([*kernels, *others, *own]) or "none"


def _softmaxes(program: Any) -> int:
    """How many the model has, without those of its loss."""
    from fxcurv.ir.graph import ancestors

    names = [str(n.target) for n in ancestors(program.heads)]
    return sum("softmax" in name and "log_softmax" not in name for name in names)


def with_column(text: str, found: dict[str, str]) -> str:
    """The table with a last column of what became of attention, which it may have already."""
    lines = []
    for line in text.splitlines():
        cells = line.strip("|").split("|")
        title = cells[0].strip()
        if line.startswith("| | "):
            line = f"|{'|'.join(c for c in cells if c.strip() != ATTENTION)}| {ATTENTION} |"
            width = line.count("|") - 1
        elif line.startswith("|---"):
            line = "|---" * width + "|"
        elif title in ROWS and line.startswith("|"):
            before = cells[width - 1].strip() if len(cells) >= width else "·"
            line = f"|{'|'.join(cells[: width - 1])}| {found.get(ROWS[title], before)} |"
        lines.append(line)
    return "\n".join(lines)


# ---- the table ------------------------------


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: a row per model, a column per group of quantities."""
    from model_checks import GROUPS

    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(GROUPS) + " |", "|---" * (len(GROUPS) + 1) + "|"]
    for title, case in ROWS.items():
        cells = [_cell({m: results.get(f"{case} {m}", {}).get(g) for m in MODES}, notes) for g in GROUPS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"[{k}] {text}  " for text, k in notes.items())])


def _cell(verdicts: dict[str, str | None], notes: dict[str, int]) -> str:
    """What the modes that have run agree on, or what each found."""
    seen: dict[str, list[str]] = {}
    for mode, verdict in verdicts.items():
        if verdict is not None:
            seen.setdefault(_mark(verdict, notes), []).append(mode)
    if not seen:
        return "·"
    ran = [mode for mode in MODES if verdicts[mode] is not None]
    parts = [mark + ("" if modes == ran == MODES else f" {_modes(modes)}") for mark, modes in seen.items()]
    return ", ".join(parts)


def _modes(modes: list[str]) -> str:
    """Bits of the dtypes, and t where the mode is training."""
    return " ".join(m.replace("float", "").replace("-eval", "").replace("-train", "t") for m in modes)


def _mark(verdict: str, notes: dict[str, int]) -> str:
    if verdict == "right":
        return "✓"
    text = _reason(verdict)
    return (
        f"{'✓' if verdict.startswith('right') else '✗' if verdict.startswith('wrong') else '–'}[{_number(text, notes)}]"
    )


def _number(text: str, notes: dict[str, int]) -> int:
    return notes.setdefault(text, len(notes) + 1)


def _reason(verdict: str) -> str:
    """The message without the place of the source, which is a path."""
    lines = [line.strip() for line in verdict.splitlines() if not line.strip().startswith('File "')]
    text = " ".join(itertools.takewhile(lambda line: not line.startswith(("Way out", "What usually")), lines))
    return text.replace("|", "\\|")[:300]


def _written() -> str:
    """The table in the document."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip("\n")


def write(text: str) -> None:
    """Put the table between its markers in the document."""
    document = DOCUMENT.read_text(encoding="utf-8")
    head, rest = document.split(BEGIN)
    _, tail = rest.split(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main(arguments: list[str]) -> int:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(ROWS.values()))
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--no-second", action="store_true", help="without Hessians and products")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a file that keeps what has run, so that it need not run again")
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md, and run nothing")
    parser.add_argument(
        "--attention", action="store_true", help="write what became of attention into the table that there is"
    )
    options = parser.parse_args(arguments)
    if options.attention:
        found = {case: attention(case) for case in track(options.models, ATTENTION, console=Console(stderr=True))}
        print(json.dumps(found, indent=1))
        write(with_column(_written(), found))
        return 0
    kept = options.results is not None and options.results.exists()
    results: dict[str, dict[str, str]] = json.loads(options.results.read_text()) if kept else {}
    if not options.write:
        wanted = jobs_of(options.models, options.modes, not options.no_second)
        missing = [tuple(g for g in groups if g not in results.get(f"{c} {m}", {})) for c, m, groups in wanted]
        wanted = [(c, m, rest) for (c, m, _), rest in zip(wanted, missing, strict=True) if rest]
        context: Any = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool:
            running = {pool.submit(run, job): job for job in wanted}
            done = concurrent.futures.as_completed(running)
            for future in track(done, "models", len(wanted), console=Console(stderr=True)):
                case, mode, _ = running[future]
                results.setdefault(f"{case} {mode}", {}).update(future.result())
                if options.results is not None:
                    options.results.write_text(json.dumps(results, indent=1))
    text = with_column(table(results), {case: attention(case) for case in options.models})
    print(text)
    if options.write:
        write(text)
    return any(v.startswith("wrong") for found in results.values() for v in found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
