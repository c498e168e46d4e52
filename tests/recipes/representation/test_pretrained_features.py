"""The recipe of pretrained features, seconds long."""

from __future__ import annotations

from paperworks.lab import execute
from paperworks.recipes.representation.pretrained_features import ERROR, EXCESS


def test_pretrained_features_measures_fall_with_unlabelled_samples_and_every_model():
    run = execute("pretrained-features", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    plain = {(m.name, m.series): m.value for m in run.measurements if m.against is None}
    ratios = {(m.name, m.series): m for m in run.measurements if m.against is not None}
    assert plain[EXCESS, "true model"] < plain[EXCESS, "pretrained, m = 1600"] < plain[EXCESS, "ridge"]
    assert plain["excess risk of the model", "m = 1600"] < plain["excess risk of the model", "m = 50"] / 4
    assert plain["excess risk, uninformative target", "m = 1600"] > 0.9
    exponent = ratios["exponent of m", "measured"]
    assert 1 < exponent.low <= exponent.value <= exponent.high
    for name in ("digits, pretrained, K = 5", "digits, pretrained, K = 15", "mixture, pretrained"):
        found = ratios[ERROR, name]
        assert found.low <= found.value <= found.high and found.against == "logistic regression"
    assert ratios[ERROR, "mixture, pretrained"].high < 1 and ratios[EXCESS, "contrastive, pretrained"].high < 1
    assert ("speed-up", "pretrained") in ratios and run.artefacts["figure"].is_file()
