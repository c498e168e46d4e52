"""Gaussian processes over time in state-space form."""
