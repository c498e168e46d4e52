"""Recipes of the uncertainty room."""
