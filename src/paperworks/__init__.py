"""The trending-papers page on which every paper runs."""

__version__ = "0.1.0"
