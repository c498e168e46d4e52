"""What a user gets who says nothing: the papers' settings, and where a paper has none, this library's."""

from __future__ import annotations

import inspect

import pytest
import torch

from paperworks.decoding import (
    FSPAD,
    AttributeClassifier,
    Chimera,
    ClassifierFreeGuidance,
    ConditionalBeamSearch,
    DynamicInference,
    EntropyAdaptiveDecoding,
    EntropySwitch,
    HiddenStateOptimization,
    Hydra,
    NextBlockPrediction,
    NGramModel,
    RecursiveSpeculation,
    RelaxedAcceptance,
    Sampling,
    StochasticBeam,
    SuperposedDecoding,
    Typical,
    collect,
    exact_mode,
    fit_tree,
    generate,
    rank_accuracy,
    self_written,
    stream,
    train_drafter,
)
from paperworks.decoding.attribute_classifier import degeneracy
from paperworks.decoding.dynamic_inference import Reading
from tests.decoding.conftest import make_model

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
DEFAULTS = [
    (Sampling, GREEDY),
    (generate, {"max_new_tokens": 128, "pad_token_id": 0, "profile": False, **GREEDY}),
    (stream, {"max_new_tokens": 128, "pad_token_id": 0, "profile": False}),
    # Medusa, arXiv 2401.10774.
    (Typical, {"epsilon": 0.09, "alpha": 0.3}),
    # 65: four heads; the released recipe has the target's law alone to learn, and no noise.
    (
        Hydra,
        {"heads": 4, "layers": 1, "prefix_layer": False, "tie_lm_head": True, "dropout": 0.0, "label_weight": 0.0,
         "teacher_weight": 1.0, "state_weight": 0.0, "noise": 0.0},
    ),
    # 23: lambda 1 on hidden states.
    (
        Chimera,
        {"heads": 4, "trigram": True, "context_layers": 1, "residual_heads": True, "tie_lm_head": True,
         "own_tokens": True, "label_weight": 1.0, "distil_weight": 1.0, "distil_on": "hidden", "memoise": False},
    ),
    # 31, with EAGLE's weights, noise and tree.
    (
        FSPAD,
        {"layers": 1, "feature_sampling": True, "fs_expand": 4.0, "fs_gate": "silu", "fs_residual": True,
         "partial_alignment": True, "nodes": 60, "depth": 6, "top_k": 10, "state_weight": 1.0, "teacher_weight": 0.1,
         "noise": 0.1},
    ),
    # 49: the code's.
    (RelaxedAcceptance, {"neighbours": None, "delta": 0.1, "mode": "tv", "first_code": 0}),
    (ClassifierFreeGuidance, {"scale": 3.0}),
    # 60: the setting of its perplexities.
    (
        SuperposedDecoding,
        {"drafts": 3, "alpha": 0.54, "temperature": 0.06, "top_tokens": 9, "weights": (0.01, 0.04, 0.15, 0.18, 0.12),
         "penalty": 200.0},
    ),
    (SuperposedDecoding.generate, {"max_new_tokens": 10, "pad_token_id": 0}),
    (NGramModel, {"max_order": 6}),
    # 66: a window of five laws.
    (
        EntropySwitch,
        {"window": 5, "min_stay": 10, "start": "small", "full_window": False, "clear_window": False, "preempt": False},
    ),
    (EntropyAdaptiveDecoding, {"entropy_of": "active", "tokenizers": None}),
    (EntropyAdaptiveDecoding.generate, {"max_new_tokens": 128, **GREEDY}),
    (EntropyAdaptiveDecoding.calibrate, {"rounds": 2}),
    # 41: ten tokens, and the training of its heads.
    (DynamicInference, {"every": 1, "head": "linear", "vocabulary": None}),
    (DynamicInference.generate, {"max_new_tokens": 10, "exit_threshold": 0.9, "stop_threshold": 0.9}),
    (DynamicInference._fit, {"epochs": 10.0, "batch_size": 12, "learning_rate": 1e-5, "weight_decay": 0.01}),
    (Reading.decide, {"exit_threshold": 0.9, "stop_threshold": 0.9}),
    # 35.
    (NextBlockPrediction, {"classes": 0, "hidden_size": 128, "layers": 4, "heads": 4}),
    (NextBlockPrediction.generate, {**GREEDY, "temperature": 1.0}),
    (NextBlockPrediction.log_prob, {"given_frames": 0}),
    (NextBlockPrediction.loss, {"given_frames": 0}),
    # 69: Bayes' rule, and a step of Adam for each window.
    (ConditionalBeamSearch, {"num_beams": 5, "weight": 1.0, "candidates": None, "length_penalty": 0.0}),
    (ConditionalBeamSearch.generate, {"max_new_tokens": 128, "pad_token_id": 0}),
    (exact_mode, {"length": None, "width": 16, "max_calls": None}),
    (AttributeClassifier, {"width": 64}),
    (AttributeClassifier.from_target, {"width": 64}),
    (
        AttributeClassifier.fit,
        {"held_out": 0.2, "epochs": 10, "batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.1},
    ),
    (degeneracy, {"ngram": 4, "repeated": 0.2, "lengths": None}),
    (
        HiddenStateOptimization,
        {"steps": 1, "learning_rate": 0.003, "window": 32, "optimizer": "adam", "betas": (0.9, 0.999), "epsilon": 1e-8},
    ),
    (HiddenStateOptimization.generate, {"max_new_tokens": 128, "pad_token_id": 0, **GREEDY}),
    (
        self_written,
        {"answer_tokens": 128, "question_tokens": 64, "temperature": 0.7, "question_temperature": 0.9,
         "question_top_k": 50, "examples": (), "shown": 3, "batch_size": 32},
    ),
    (collect, {"batch_size": 16}),
    (
        train_drafter,
        {"epochs": 3.0, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.05, "weight_decay": 0.0,
         "final_fraction": 0.1},
    ),
    (rank_accuracy, {"ranks": 10, "batch_size": 8, "greedy": False}),
    (fit_tree, {"ranks": 10, "greedy": True}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "wanted"), DEFAULTS, ids=[call.__qualname__ for call, _ in DEFAULTS])
def test_what_is_left_out_is_set_as_documented(call, wanted):
    parameters = inspect.signature(call).parameters
    assert {name: parameters[name].default for name in wanted} == wanted


def test_what_is_left_out_and_depends_on_the_model_is_set_as_documented():
    model = make_model()
    assert RecursiveSpeculation.from_target(model, draft=1).tree == StochasticBeam(width=3, depth=4)
    nearest = (torch.arange(1200)[:, None] + 1 + torch.arange(1199)) % 1200
    assert torch.equal(RelaxedAcceptance(nearest).nearest, nearest[:, :1000])
    beams = [ConditionalBeamSearch(model, lambda hidden, tokens: hidden[..., 0], num_beams=n) for n in (3, 30)]
    assert [search.candidates for search in beams] == [6, 40]
