"""Custom ops: a file each, with reference, CPU implementation and fake beside each other."""
