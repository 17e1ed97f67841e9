"""A model for programs other than PyTorch: its network in ONNX, and the numbers of its sampling loop in JSON."""
