"""KFRA: one batch-averaged matrix down a chain of ops."""
