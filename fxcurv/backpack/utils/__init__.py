"""Helpers under BackPACK's names."""
