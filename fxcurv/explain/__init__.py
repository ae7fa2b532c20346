"""Seeing a program: what was chosen, what it costs, what it looks like."""
