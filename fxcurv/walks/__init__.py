"""How derivatives travel through a captured graph."""
