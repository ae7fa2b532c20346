"""Products with Jacobians, the Hessian and the Gauss-Newton by autograd alone, under BackPACK's names."""
