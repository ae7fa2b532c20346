"""BackPACK's use, on top of the compiler.

from fxcurv.backpack import backpack, extend
from fxcurv.backpack.extensions import DiagGGNMC

model, lossfunc = extend(model), extend(lossfunc)
loss = lossfunc(model(x), y)
with backpack(DiagGGNMC()):
loss.backward()  # p.grad and p.diag_ggn_mc
"""

from fxcurv.backpack import extensions
from fxcurv.backpack.context import backpack, disable
from fxcurv.backpack.extended import extend

__all__ = ["backpack", "disable", "extend", "extensions"]
