"""BackPACK's modules for operations, as plain modules: the compiler reads `+` and `x[0]` as well."""
