"""What the backward pass recomputes."""

import jax

# config.model.remat; None keeps all activations.
REMAT_POLICIES = {
    "none": None,
    "layer": jax.checkpoint_policies.nothing_saveable,
    # Attention's own products, which grow with the square of the length, are recomputed too.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
