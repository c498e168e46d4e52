"""Recipes of the decoding room."""
