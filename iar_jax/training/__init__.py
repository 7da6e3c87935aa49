"""Train states, the optimizer and the jitted steps."""
