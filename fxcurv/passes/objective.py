"""objective: what kind of function of f the loss is, and where its curvature is born.

A loss that is a linear map of terms in closed form (cross-entropy, squares, BCE) after a linear map of f has a root at
each term. Any other loss is one general term: its Hessian per sample.
"""

from __future__ import annotations

from fxcurv.errors import LossError, MixedSamplesError
from fxcurv.ir.mixing import mixing
from fxcurv.ir.origin import at_loss
from fxcurv.ir.program import Program
from fxcurv.passes.ends import check_ends
from fxcurv.walks.loss import find_terms


def objective(program: Program) -> Program:
    """Check the loss and find its terms (`analysis.terms`)."""
    extensions = program.extensions
    if program.loss is not None:
        _check_loss(program)
    of_output = [e for e in extensions if e.requires.of_loss and not e.requires.of_ops]
    if of_output:
        check_ends(program, ", ".join(type(e).__name__ for e in of_output))
    if not program.batch.whole:
        program.analysis.mixing = mixing(program) or ""
        _check_independence(program)
    if any(e.requires.of_loss for e in extensions):
        if program.loss is None:
            names = ", ".join(type(e).__name__ for e in extensions if e.requires.of_loss)
            raise LossError(f"{names} needs a loss: pass one to fxcurv.compile(model, loss, ...)")
        program.analysis.terms = find_terms(program)
        _check_sampled(program)
        _check_empirical(program)
    return program


def _check_loss(program: Program) -> None:
    if not program.loss.meta.get("active"):
        raise LossError(
            f"{at_loss(program.loss)}the loss does not depend on any trainable parameter.\n"
            "Way out: check requires_grad, .detach() and no_grad in the model, and that the loss is computed from the model's "
            "output by differentiable ops."
        )


def _check_independence(program: Program) -> None:
    asked = [e for e in program.extensions if e.per_sample]
    if not asked or not program.analysis.mixing:
        return
    names = ", ".join(type(e).__name__ for e in [e for e in asked if not e.whole_batch] or asked)
    raise MixedSamplesError(program.analysis.mixing.format(asked=names))


def _check_sampled(program: Program) -> None:
    """Columns are sampled from the likelihood that a loss in closed form has; a loss that couples samples has none."""
    sampled = ", ".join(type(e).__name__ for e in program.extensions if e.requires.sampled)
    if program.analysis.mixing and sampled and any(term.node is None for term in program.analysis.terms):
        raise MixedSamplesError(program.analysis.mixing.format(asked=sampled))


def _check_empirical(program: Program) -> None:
    """The empirical column needs a likelihood, which a loss that is linear in f does not have."""
    asked = ", ".join(type(e).__name__ for e in program.extensions if e.requires.of_targets)
    if asked and not program.analysis.terms:
        raise LossError(
            f"{at_loss(program.loss)}"
            f'{asked}(fisher="empirical") needs a loss in closed form (cross-entropy, squares, binary cross-entropy with '
            'logits), and this one is linear in the model\'s output. Way out: fisher="mc", which is zero.'
        )
