"""Pure functions on codebooks: balanced clusters, orders, permutations."""
