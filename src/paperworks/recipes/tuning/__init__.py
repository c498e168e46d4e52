"""Recipes of the tuning room."""
