"""IAR, improved autoregressive visual generation (arXiv 2501.00880), in JAX."""

__version__ = "0.1.0"
