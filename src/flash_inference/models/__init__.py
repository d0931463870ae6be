"""Architectures as short compositions of shared blocks."""
