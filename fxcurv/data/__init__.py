"""What `over` is made of: the weight of a batch, rows in memory or files, and the sample that is not finite."""
