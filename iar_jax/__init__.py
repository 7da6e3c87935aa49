"""IAR, improved autoregressive visual generation (arXiv 2501.00880), in JAX."""

import os

# TensorFlow comes in with clu and tensorflow-datasets and prints to the terminal when it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

__version__ = "0.2.0"
