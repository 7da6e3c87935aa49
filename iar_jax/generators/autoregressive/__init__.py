"""LlamaGen's class-conditional transformer, which predicts codes one by one."""
