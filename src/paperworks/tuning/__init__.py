"""Choose hyper-parameters.

A method of this room is an optimiser, a parametrisation or a surrogate over a user's own model or objective, on BoTorch where it is Bayesian
optimisation.
"""
