"""Inspecting a user's own classifier or VAE."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from typer.testing import CliRunner

from paperworks import cli
from paperworks.consult.inspection import batches, inspect, load_network
from paperworks.errors import UsageError

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
