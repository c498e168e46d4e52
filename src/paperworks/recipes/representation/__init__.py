"""Recipes of the representation room."""
