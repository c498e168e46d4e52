"""Inspecting a user's own classifier or VAE."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

from paperworks import cli, hub
from paperworks.consult.inspection import batches, inspect, load_network
from paperworks.errors import UsageError
from paperworks.representation import NeuralCollapse, PosteriorCollapse

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(64, 3)
        with torch.no_grad():
            self.mean.weight.zero_()
            self.mean.bias.zero_()
            self.mean.weight[0, 20:40] = 0.5

    def encode(self, x):
        # The first variable is sure of itself, the others are the prior.
        return self.mean(x), torch.tensor([-6.0, 0.0, 0.0]).expand(len(x), 3)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODEL)
    return path


def figures(found):
    return {finding.name: finding.value for finding in found.findings}


def test_a_collapsed_classifier_is_told_from_one_that_is_not(script):
    loader = batches("digits", 200)
    assert (
        len(torch.cat([labels for _, labels in loader]).unique()) == 10
        and sum(len(labels) for _, labels in loader) == 1797
    )
    plain = inspect(load_network(f"{script}:build"), loader)
    assert plain.kind == "classifier" and plain.layer == "2" and plain.samples == 1797
    assert figures(plain)["nc1"] > 0.1 and "train on" in plain.findings[0].says and "neural-collapse" in plain.figures

    class Oracle(nn.Module):
        """Says each digit's class by a look-up, so that its features have collapsed."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(10, 10, bias=False)
            nn.init.eye_(self.fc.weight)

        def forward(self, x):
            return self.fc(nn.functional.one_hot(self.labels[x.sum(1).long() % 10]).float())

    labels = torch.arange(10)
    oracle = Oracle()
    oracle.labels = labels
    inputs = torch.arange(40)[:, None].float()
    found = inspect(oracle, [(inputs, labels.repeat(4))])
    assert figures(found)["nc1"] < 1e-9 and figures(found)["nc4"] == 0 and figures(found)["nc2_of"] < 1e-9
    assert "points" in found.findings[0].says and "not points" not in found.findings[0].says


def test_lost_classes_and_imbalance_are_named():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1e-4, 0]]))
    labels = torch.tensor([0] * 12 + [1] * 4 + [2] * 2)
    features = torch.eye(4)[labels] + 0.1 * torch.randn(18, 4, generator=torch.Generator().manual_seed(0))
    found = inspect(model, [(features, labels)])
    says = {finding.name: finding.says for finding in found.findings}
    assert figures(found)["largest class / smallest"] == 6 and "balance" in says["largest class / smallest"]
    assert figures(found)["classes lost"] == 1 and "class 2 has no row" in says["classes lost"]


def test_a_vae_is_looked_at_through_its_encoder(script):
    loader = batches("digits")
    found = inspect(load_network(f"{script}:VAE"), loader)
    told = figures(found)
    assert found.kind == "VAE" and told["collapsed variables"] == 2 and told["latent variables"] == 3
    assert told["active variables"] == 1 and told["passive variables"] == 2
    assert set(found.figures) == {"posterior-collapse", "variable-activity"}


def test_weights_come_from_safetensors(script, tmp_path):
    model = load_network(f"{script}:build")
    with torch.no_grad():
        model[0].weight.fill_(0.25)
    save_model(model, str(tmp_path / "w.safetensors"))
    assert float(load_network(f"{script}:build", weights=tmp_path / "w.safetensors")[0].weight.mean()) == 0.25
    with pytest.raises(UsageError, match="do not fit"):
        load_network(f"{script}:VAE", weights=tmp_path / "w.safetensors")


def test_the_command_prints_one_report(script, tmp_path):
    options = ["inspect", "--model", f"{script}:build", "--data", "digits", "--figure", str(tmp_path / "out")]
    shown = CliRunner().invoke(cli.app(), options)
    assert shown.exit_code == 0 and "classifier, 2, 1797 samples" in shown.output
    assert (tmp_path / "out" / "neural-collapse.png").is_file()
    told = json.loads(CliRunner().invoke(cli.app(), [*options, "--json"]).output)
    assert told["kind"] == "classifier" and {"nc1", "nc4"} <= {finding["name"] for finding in told["findings"]}


def test_a_file_has_its_own_name_and_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 3\n")
    (tmp_path / "random.py").write_text(
        "from torch import nn\nfrom beside import WIDTH\n\ndef build():\n    return nn.Linear(4, WIDTH)\n"
    )
    before = list(sys.path)
    assert load_network(f"{tmp_path}/random.py:build").out_features == 3
    assert sys.path == before and hasattr(sys.modules["random"], "shuffle")


def test_files_that_fail_are_one_clear_sentence(script, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    script.write_text(
        f"{MODEL}\nNUMBER = 3\n\ndef wide(width):\n    return nn.Linear(width, 2)\n\ndef text():\n    return 'x'\n"
    )
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors")
    for spec, weights, words in (
        (f"{broken}:build", None, "fails when it is loaded, with ZeroDivisionError"),
        (f"{script}:NUMBER", None, "is of type int: give a torch.nn.Module"),
        (f"{script}:wide", None, "cannot be called without arguments .*width"),
        (f"{script}:text", None, "gives a str, and a torch.nn.Module is wanted"),
        (f"{script}:build", damaged, "do not fit"),
        (f"{script}:build", tmp_path / "none.safetensors", "do not fit"),
        (str(tmp_path), damaged, "comes with its own weights"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            load_network(spec, weights=weights)
        assert len(str(error.value).splitlines()) == 1
    assert not [name for name in sys.modules if name.endswith("broken")]
    loader = iter(batches("digits"))
    with pytest.raises(UsageError, match="is used up when it is gone through once"):
        inspect(load_network(f"{script}:build"), loader)


def test_bad_input_is_one_clear_sentence(script, tmp_path):
    loader = batches("digits")
    for spec, words in (
        (f"{script}:nothing", "has no 'nothing'"),
        (f"{tmp_path}/none.py:build", "no file"),
        ("no.such.package:build", "cannot be imported"),
        (str(tmp_path), "no transformers image classifier"),
        (f"{script}:MODEL", None),
    ):
        with pytest.raises(UsageError, match=words):
            load_network(spec)
    model = load_network(f"{script}:build")
    for network, layer, words in (
        (model, "fc", "no layer 'fc'"),
        (model, "1", "is a ReLU"),
        (nn.Sequential(nn.ReLU()), None, "no diagnosis applies"),
        (nn.Sequential(nn.Linear(5, 10)), None, "cannot be looked at"),
    ):
        with pytest.raises(UsageError, match=words):
            inspect(network, loader, layer=layer)
    text = tmp_path / "text.txt"
    text.write_text("words")
    with pytest.raises(UsageError, match="neither a table nor images"):
        batches(str(text))


def test_a_classifier_whose_weights_do_not_fill_it_is_refused(script, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    network = load_network(str(tmp_path / "vit"))
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    file = tmp_path / "vit" / "model.safetensors"
    weights = {name.replace("classifier", "head"): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"lack 2 of the model's 24 tensors: classifier\.bias, .*own network is FILE\.py"
    ):
        load_network(str(tmp_path / "vit"))
    file.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="no transformers image classifier that loads"):
        load_network(str(tmp_path / "vit"))
    with pytest.raises(UsageError, match="do not fit"):
        load_network(f"{script}:build", weights=file)


def test_a_table_is_cut_into_batches_in_its_order(script):
    X, y = load_digits(return_X_y=True)
    for options, size in (({}, 256), ({"batch_size": 500}, 500)):
        loader = batches("digits", **options)
        assert [len(part) for part, _ in loader] == [size] * (1797 // size) + [1797 % size]
        shown, labels = (torch.cat(one) for one in zip(*loader, strict=True))
        assert shown.dtype == torch.float32 and np.array_equal(shown, X) and np.array_equal(labels, y)


@pytest.mark.parametrize("spelt", [str, lambda label: f"{label}.0", lambda label: ("ant", "bee", "cat")[label]])
def test_the_labels_of_a_table_of_ones_own_are_classes(script, tmp_path, spelt):
    X, y = load_digits(n_class=3, return_X_y=True)
    lines = [",".join([*map(str, row), spelt(label)]) for row, label in zip(X, y.tolist(), strict=True)]
    (tmp_path / "own.csv").write_text("\n".join([",".join([*(f"p{i}" for i in range(64)), "label"]), *lines]))
    loader = batches(str(tmp_path / "own.csv"))
    labels = torch.cat([labels for _, labels in loader])
    assert labels.dtype == torch.int64 and labels.tolist() == y.tolist()
    model = nn.Sequential(nn.Linear(64, 3))
    own = {finding.name: finding.value for finding in inspect(model, loader).findings}
    told = {
        finding.name: finding.value for finding in inspect(model, [(torch.tensor(X).float(), torch.tensor(y))]).findings
    }
    assert own == pytest.approx(told, rel=1e-4)


def test_rows_whose_target_is_no_class_keep_it(tmp_path):
    (tmp_path / "own.csv").write_text("a,b,price\n1,2,3.5\n4,5,6.25\n7,9,1\n")
    [(X, y)] = batches(str(tmp_path / "own.csv"))
    assert X.tolist() == [[1, 2], [4, 5], [7, 9]] and y.tolist() == [3.5, 6.25, 1]


def test_images_have_values_from_0_to_1_and_one_channel(monkeypatch):
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2) * 23
    found = hub.ImageData("pictures", images, np.array([0, 1, 0]), ("a", "b"))
    monkeypatch.setattr(hub, "load_dataset", {"pictures": found}.get)
    (shown, labels), (rest, _) = batches("pictures", 2)
    assert shown.shape == (2, 1, 2, 2) and shown.dtype == torch.float32 and labels.dtype == torch.int64
    assert np.allclose(torch.cat([shown, rest])[:, 0], images / 255, atol=1e-7) and labels.tolist() == [0, 1]


def looked_at(weight, features, labels):
    model = nn.Linear(2, len(weight), bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
    found = inspect(model, [(torch.tensor(features, dtype=torch.float64), torch.tensor(labels))])
    return {finding.name: finding for finding in found.findings}


@pytest.mark.parametrize("squared, collapsed", [(0.19, True), (0.21, False)])
def test_classes_are_points_where_nc1_is_below_a_tenth(squared, collapsed):
    # Means of -1 and 1, and noise along them: tr(Sigma_W pinv(Sigma_B)) / 2 is half its square.
    noise = math.sqrt(squared)
    features = [[-1 - noise, 0.0], [-1 + noise, 0.0], [1 - noise, 0.0], [1 + noise, 0.0]]
    found = looked_at([[-1.0, 0.0], [1.0, 0.0]], features, [0, 0, 1, 1])["nc1"]
    assert found.value == pytest.approx(squared / 2)
    assert found.says.startswith("classes have collapsed to points" if collapsed else "classes are not points yet")


@pytest.mark.parametrize("distance, alike", [(0.29, True), (0.31, False)])
def test_classifier_and_means_point_the_same_way_below_three_tenths(distance, alike):
    angle = 2 * math.asin(distance / 2)
    row = [math.cos(angle), math.sin(angle)]
    found = looked_at([[-row[0], -row[1]], row], [[-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [0, 0, 1, 1])
    assert found["nc3"].value == pytest.approx(distance)
    assert ("point the same way" if alike else "point different ways") in found["nc3"].says
    assert found["nc2_etf"].value == pytest.approx(0, abs=1e-9) and "rows are a simplex" in found["nc2_etf"].says


@pytest.mark.parametrize("distance, orthogonal", [(0.19, True), (0.21, False)])
def test_rows_are_a_frame_below_two_tenths(distance, orthogonal):
    # Unit rows of cosine c are sqrt(2 - 2 / sqrt(1 + c^2)) from an orthogonal frame.
    cosine = math.sqrt((2 / (2 - distance**2)) ** 2 - 1)
    rows = [[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]]
    found = looked_at(rows, [rows[0], rows[0], rows[1], rows[1]], [0, 0, 1, 1])["nc2_of"]
    assert found.value == pytest.approx(distance)
    assert ("rows are orthogonal" if orthogonal else "0 would be orthogonal") in found.says


@pytest.mark.parametrize("counts, balanced", [((7, 5), True), ((6, 4), False)])
def test_classes_are_imbalanced_from_one_and_a_half(counts, balanced):
    labels = [0] * counts[0] + [1] * counts[1]
    found = looked_at([[-1.0, 0.0], [1.0, 0.0]], [[2.0 * k - 1, 0.1 * i] for i, k in enumerate(labels)], labels)
    balance = found["largest class / smallest"]
    assert balance.value == pytest.approx(counts[0] / counts[1]) and bool(balance.says) != balanced


@pytest.mark.parametrize("length, lost", [(0.0099, True), (0.0101, False)])
def test_a_row_below_a_hundredth_of_the_longest_is_lost(length, lost):
    weight = [[0.0, 2.0], [2 * length, 0.0], [1.0, 1.0]]
    features = [[-1.0, 0.1], [-1.0, 0.2], [1.0, 0.1], [1.1, 0.0], [0.0, 2.0], [0.1, 2.0]]
    found = looked_at(weight, features, [0, 0, 1, 1, 2, 2])["classes lost"]
    assert (
        found.value == lost
        and found.says.startswith("class 1 has no row left" if lost else "")
        and lost == bool(found.says)
    )


def test_figures_are_those_of_the_metrics(script):
    loader = batches("digits", 300)
    model = load_network(f"{script}:build")
    found = inspect(model, loader)
    assert [finding.name for finding in found.findings] == [
        "nc1", "nc2_etf", "nc2_of", "nc3", "nc4", "largest class / smallest", "classes lost",
    ]  # fmt: skip
    expected = NeuralCollapse.from_model(model, loader, "2").compute()
    for finding in found.findings[:5]:
        assert finding.value == pytest.approx(float(expected[finding.name]))
    _, counts = np.unique(load_digits().target, return_counts=True)
    assert found.findings[5].value == pytest.approx(counts.max() / counts.min()) and found.findings[6].value == 0
    vae = load_network(f"{script}:VAE")
    found, report = inspect(vae, loader), PosteriorCollapse.from_encoder(vae.encode, loader).compute()
    assert figures(found) == {
        "collapsed variables": 2, "latent variables": 3, "active units": pytest.approx(1 / 3), "active variables": 1,
        "mixed variables": 0, "passive variables": 2,
    }  # fmt: skip
    says = {finding.name: finding.says for finding in found.findings}
    assert says["collapsed variables"] == report.advise() and says["passive variables"].startswith("2 of 3 are noise")
    assert (
        "Figure" not in repr(found)
        and says["mixed variables"] == ""
        and found.layer == "encode"
        and found.samples == 1797
    )


def test_a_layer_that_is_named_makes_a_vae_a_classifier(script):
    vae = load_network(f"{script}:VAE")
    vae.forward = vae.mean.__call__
    x, y = batches("digits")[0]
    found = inspect(vae, [(x, y % 3)], layer="mean")
    assert found.kind == "classifier" and found.layer == "mean" and found.samples == 256
