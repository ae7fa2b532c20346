"""The parts of `over`: the weight of a batch, rows in memory or files, and the sample that is not finite."""
