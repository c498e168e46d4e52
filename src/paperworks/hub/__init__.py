"""The hub: models and data by name.

`load_model` and `load_dataset` take a name or a path, and look in this order: the path, the folder that
`PAPERWORKS_DATA` names, what an installed package ships, the Hugging Face Hub or OpenML.

Example:
    >>> from paperworks.hub import load_dataset, load_model, prompts
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> model.config.num_hidden_layers
    2
    >>> load_dataset("diabetes").X.shape
    (442, 10)
    >>> len(prompts())
    40
"""

from paperworks.hub.data import datasets, load_dataset, prompts
from paperworks.hub.kinds import (
    CharacterData,
    Conversation,
    Dataset,
    ImageData,
    Problem,
    Question,
    QuestionData,
    SeriesData,
    TableData,
    TextData,
)
from paperworks.hub.models import load_model, models
from paperworks.hub.places import Entry

__all__ = [
    "CharacterData",
    "Conversation",
    "Dataset",
    "Entry",
    "ImageData",
    "Problem",
    "Question",
    "QuestionData",
    "SeriesData",
    "TableData",
    "TextData",
    "datasets",
    "load_dataset",
    "load_model",
    "models",
    "prompts",
]
