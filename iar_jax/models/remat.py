"""What the backward pass recomputes."""

import jax

# Name (`jax.ad_checkpoint.checkpoint_name`) of what is worth keeping: results of products, of attention, of sums and of
# random draws. What lies between them is made again while it is read.
KEPT = "kept"


def kept(primitive, *_, **params) -> bool:
    # cuDNN's attention keeps its own residuals under no name.
    return params.get("name") == KEPT or primitive.name.startswith("dot_product_attention_fwd")


# config.model.remat.
REMAT_POLICIES = {
    "none": kept,
    "layer": jax.checkpoint_policies.nothing_saveable,
    # Attention's own products, which grow with the square of the length, are recomputed too.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
