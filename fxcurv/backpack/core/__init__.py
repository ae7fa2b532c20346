"""BackPACK's inside, as far as code that is built on it imports it."""
