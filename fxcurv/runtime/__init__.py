"""One program per kind of input, and one call of it."""
