"""Generate faster.

A method of this room is a `Drafter`, which proposes a `TokenTree`; an `Acceptance`, which decides what of a tree to keep;
or a decoder of its own. Drafters and acceptances go through one loop, `generate`, which also serves as transformers'
`model.generate(custom_generate=as_custom_generate(...))`.

What each keeps to: with `Greedy` or `Exact` acceptance any drafter gives exactly the target's law (its greedy text at
temperature 0), and a rejected branch leaves the key-value cache as it was. `TemporalFusion` serves many requests in one
stream of passes. The other decoders (`SuperposedDecoding`, `EntropyAdaptiveDecoding`, `DynamicInference`,
`NextBlockPrediction`, `ConditionalBeamSearch`, `HiddenStateOptimization`) take the model first and have a `generate` of
their own, as what they return is theirs alone.
"""

from paperworks.decoding.acceptance import Acceptance, Accepted, Exact, Greedy, Typical
from paperworks.decoding.attribute_classifier import AttributeClassifier
from paperworks.decoding.cache import SlotCache, TreeCache
from paperworks.decoding.chimera import Chimera
from paperworks.decoding.conditional_beam_search import ConditionalBeamSearch, Hypotheses, Mode, exact_mode
from paperworks.decoding.costs import PassCosts, pass_costs
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.dynamic_inference import Completion, DynamicInference
from paperworks.decoding.engine import Generation, Statistics, as_custom_generate, generate, stream
from paperworks.decoding.entropy_adaptive import EntropyAdaptiveDecoding, EntropySwitch
from paperworks.decoding.fspad import FSPAD
from paperworks.decoding.guidance import ClassifierFreeGuidance
from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization
from paperworks.decoding.hydra import Hydra, Medusa
from paperworks.decoding.next_block import NextBlockPrediction
from paperworks.decoding.ngram import NGramModel
from paperworks.decoding.recursive_speculation import (
    ConstantBranching,
    IndependentSequences,
    RecursiveSpeculation,
    StochasticBeam,
)
from paperworks.decoding.relaxed_acceptance import RelaxedAcceptance, nearest_codes
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.superposed import Drafts, SuperposedDecoding
from paperworks.decoding.target import Target
from paperworks.decoding.temporal_fusion import RequestHandle, ServingStatistics, TemporalFusion, compaction_plan
from paperworks.decoding.training import (
    DraftingData,
    collect,
    fit_tree,
    rank_accuracy,
    self_written,
    train_drafter,
)
from paperworks.decoding.tree import TokenTree, TreeShape

__all__ = [
    "FSPAD",
    "Acceptance",
    "Accepted",
    "AttributeClassifier",
    "Chimera",
    "ClassifierFreeGuidance",
    "Committed",
    "Completion",
    "ConditionalBeamSearch",
    "ConstantBranching",
    "Drafter",
    "DraftingData",
    "Drafts",
    "DynamicInference",
    "EntropyAdaptiveDecoding",
    "EntropySwitch",
    "Exact",
    "Generation",
    "Greedy",
    "HiddenStateOptimization",
    "Hydra",
    "Hypotheses",
    "IndependentSequences",
    "Medusa",
    "Mode",
    "NGramModel",
    "NextBlockPrediction",
    "PassCosts",
    "RecursiveSpeculation",
    "RelaxedAcceptance",
    "RequestHandle",
    "Sampling",
    "ServingStatistics",
    "SlotCache",
    "Statistics",
    "StochasticBeam",
    "SuperposedDecoding",
    "Target",
    "TemporalFusion",
    "TokenTree",
    "TreeCache",
    "TreeShape",
    "Typical",
    "as_custom_generate",
    "collect",
    "compaction_plan",
    "exact_mode",
    "fit_tree",
    "generate",
    "nearest_codes",
    "pass_costs",
    "rank_accuracy",
    "self_written",
    "stream",
    "train_drafter",
]
