"""BackPACK's use, on top of the compiler.

Example:
    from fxcurv.backpack import backpack, extend
    from fxcurv.backpack.extensions import DiagGGNMC

    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(x), y)
    with backpack(DiagGGNMC()):
        loss.backward()  # p.grad and p.diag_ggn_mc

Quantities of the first order need no extended loss: any scalar of the model's output will do. Beside it there are
`extensions`, `hessianfree`, `utils` and `custom_module`, with BackPACK's names and paths.
"""

from fxcurv.backpack import extensions
from fxcurv.backpack.context import backpack, disable
from fxcurv.backpack.extended import extend

__all__ = ["backpack", "disable", "extend", "extensions"]
