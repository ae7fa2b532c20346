"""BackPACK's internals, as far as code that is built on BackPACK imports them."""
