"""Products with curvature matrices, matrix-free: every parameter's diagonal block as a callable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Extension, Param
from fxcurv.ir.program import Decision
from fxcurv.quantity import Product


@dataclass(frozen=True)
class _Products(Extension):
    """Shared by the products: they see the forward graph as a whole, and need no columns."""

    per_sample = False
    any_sample = True
    kind: ClassVar[str] = ""
    operator: ClassVar[str] = ""

    @property
    def requires(self) -> Product:
        return Product(self.kind)

    def extract_all(self, params: list[Param]):
        program = params[0].program
        blocks, whole = program.walked.products[self.requires, tuple(p.name for p in params)]
        program.borrowing |= {self.savefield, self.operator}
        for p in params:
            algorithm = f"matrix-free, {len(whole.labels)} values kept"
            program.decisions.append(Decision(p.name, p.label, "", algorithm, 0, 0, 0.0, (), self.savefield, "extract"))
        return blocks, {self.operator: whole} if self.operator else {}


@dataclass(frozen=True)
class GGNMP(_Products):
    """Products with the generalised Gauss-Newton: a callable per parameter, [V, *P] or [*P] -> the same.

    Also sets `result.ggn`, the matrix over all of these parameters, `result.ggn @ v`. Samples may interact (batch norm).
    """

    savefield = "ggnmp"
    kind = "ggn"
    operator = "ggn"
    needs_convex = True


@dataclass(frozen=True)
class HMP(_Products):
    """Products with the Hessian: a callable per parameter, [V, *P] or [*P] -> the same.

    Also sets `result.hessian`, the matrix over all of these parameters, `result.hessian @ v`. Samples may interact (batch norm).
    """

    savefield = "hmp"
    kind = "hessian"
    operator = "hessian"


@dataclass(frozen=True)
class PCHMP(_Products):
    """Products with the positive-curvature Hessian: a callable per parameter, [V, *P] or [*P] -> the same.

    The Hessian is a sum over ops of J^T R J, R the op's residual. Here every R has its eigenvalues clipped at 0 or made
    positive. For networks that are piecewise linear up to a convex loss it is the generalised Gauss-Newton.

    Args:
        savefield: the field of the result.
        modify: "clip" (negative eigenvalues become 0) or "abs" (their absolute values).
    """

    savefield: str = "pchmp"
    modify: str = "clip"
    kind = "pch"

    @property
    def requires(self) -> Product:
        return Product(self.kind, self.modify)

    def check(self) -> None:
        if self.modify not in ("clip", "abs"):
            raise ExtensionError(f"PCHMP(modify={self.modify!r}): use 'clip' or 'abs'")
