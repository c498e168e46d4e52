"""The page in front of the lab: search, trending, subscriptions, and a run button on every paper."""
