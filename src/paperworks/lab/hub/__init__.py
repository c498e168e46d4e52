"""The hub: models and data by name.

`load_model` and `load_dataset` take a name or a path, and look in this order: the path, the folder that
`PAPERWORKS_DATA` names, what an installed package ships, the Hugging Face Hub or OpenML.

Example:
    >>> from paperworks.lab.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> model.config.num_hidden_layers
    2
"""

from paperworks.lab.hub.models import load_model, models
from paperworks.lab.hub.places import Entry

__all__ = ["Entry", "load_model", "models"]
