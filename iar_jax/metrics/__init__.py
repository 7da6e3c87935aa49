"""Features, distances between image sets, and the report."""
