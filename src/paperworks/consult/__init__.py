"""A user's own model: look into what it has learnt, and write text with it."""
