"""BackPACK's interface on top of the compiler.

Example:
    from fxcurv.backpack import backpack, extend
    from fxcurv.backpack.extensions import DiagGGNMC

    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(x), y)
    with backpack(DiagGGNMC()):
        loss.backward()  # p.grad and p.diag_ggn_mc

First-order quantities need no extended loss: any scalar computed from the model's output will do. `extensions`,
`hessianfree`, `utils` and `custom_module` have BackPACK's names and paths; the functions of `hessianfree` can be
imported from here as well. After `install()`, `import backpack` imports all of this, for packages that are built on
BackPACK.
"""

from fxcurv.backpack import extensions
from fxcurv.backpack.context import backpack, disable
from fxcurv.backpack.extended import extend, memory_cleanup
from fxcurv.backpack.hessianfree.ggnvp import ggn_vector_product, ggn_vector_product_from_plist
from fxcurv.backpack.hessianfree.hvp import hessian_vector_product
from fxcurv.backpack.hessianfree.lop import L_op, transposed_jacobian_vector_product
from fxcurv.backpack.hessianfree.rop import R_op, jacobian_vector_product
from fxcurv.backpack.install import install, uninstall

__all__ = [
    "L_op", "R_op", "backpack", "disable", "extend", "extensions", "ggn_vector_product", "ggn_vector_product_from_plist",
    "hessian_vector_product", "install", "jacobian_vector_product", "memory_cleanup", "transposed_jacobian_vector_product",
    "uninstall",
]  # fmt: skip
