"""Losses of the transformer and of the tokenizer, as pure functions."""
