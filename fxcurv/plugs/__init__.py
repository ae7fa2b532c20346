"""fxcurv inside other libraries, one file each; `pip install fxcurv[plugs]` installs them."""
