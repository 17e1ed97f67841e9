"""Any image → batches in [-1, 1]."""
