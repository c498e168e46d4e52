"""The addresses of the page, by what readers do there."""
