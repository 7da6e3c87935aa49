"""Halton-MaskGIT's masked transformer, which sets all codes of a picture in a few passes."""
