"""Decoding with a KV cache and the choice of the next code."""
