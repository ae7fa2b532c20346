"""syrk_conv on CUDA: `syrk`'s kernel."""

from fxcurv.kernels.syrk_triton import syrk_conv

__all__ = ["syrk_conv"]
