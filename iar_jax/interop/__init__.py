"""PyTorch weight files in and out, without PyTorch."""
