"""Networks, in flax.linen: tokenizer, transformer, and the judges of images."""
