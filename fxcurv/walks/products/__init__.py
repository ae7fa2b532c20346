"""Matrix-free products: a tangent walks forward, an adjoint walks backward."""
