"""The Wasserstein dependency measure and its contrastive loss (arXiv 1903.11780)."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import nn

from paperworks.representation import (
    ConcatCritic,
    WassersteinDependency,
    exact_wasserstein_dependency,
    wasserstein_dependency,
)
from paperworks.representation.wasserstein_dependency import derangement


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(size, dim=4, width=8, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(size, width), activation(), nn.Linear(width, dim)).double()


def signs(a, n=2000):
    return a * (2.0 * torch.randint(2, (n, 1), generator=seeded()) - 1)


@pytest.fixture
def pairs():
    x = torch.randn(12, 5, dtype=torch.float64, generator=seeded())
    return x, x[:, :3] + 0.1 * torch.randn(12, 3, dtype=torch.float64, generator=seeded(1))


@pytest.fixture
def encoders():
    torch.manual_seed(0)
    return encoder(5), encoder(3)


@pytest.mark.parametrize("a", [0.01, 1.5, 40.0])
def test_1_exact_measure_of_equal_signs_is_their_size_while_the_information_stays_log_2(a):
    x = torch.tensor([[-a], [a]], dtype=torch.float64)
    assert exact_wasserstein_dependency(x, x, torch.eye(2) / 2) == pytest.approx(a, rel=1e-9)
    # A steep critic, all pairs scored at once: the contrastive bound is tight whatever the size.
    steep = WassersteinDependency(nn.Identity(), nn.Identity(), lipschitz=None)
    many = x.repeat(200, 1)
    assert steep.diagnose(many, 100 / a**2 * many).info_nce == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("lam", "tolerance"), [(100.0, 0.05), (10.0, 0.2)])
def test_1_critic_estimates_the_exact_measure(lam, tolerance):
    x = signs(1.5)
    found = wasserstein_dependency(x, x, lam=lam, steps=600, batch_size=64, generator=seeded())
    assert found.wasserstein == pytest.approx(1.5, rel=tolerance)
    # The best critic under a soft penalty has slope 1 + W / (2 lam unit), as one differentiates W L - lam (L - 1)^2.
    assert found.wasserstein == pytest.approx(1.5 * (1 + 1 / (2 * math.sqrt(2) * lam)), rel=0.025)
    assert found.conservative == pytest.approx(found.wasserstein / float(found.gradient_norms.max()), rel=1e-6)
    assert 0.9 * 1.5 < found.conservative < 1.02 * 1.5
    assert found.info_nce < math.log(2) + 0.05


@pytest.mark.parametrize("seed", range(3))
def test_1_linear_programme_equals_one_over_all_plans(seed):
    """The full transport problem, in which mass that could stay may travel too."""
    x, y = torch.randn(3, 2, generator=seeded(seed)), torch.randn(4, 1, generator=seeded(seed + 9))
    p = torch.rand(3, 4, generator=seeded(seed + 20)).double()
    p /= p.sum()
    atoms = torch.cat([x.repeat_interleave(4, 0), y.repeat(3, 1)], 1).double()
    source, sink = p.flatten().numpy(), torch.outer(p.sum(1), p.sum(0)).flatten().numpy()
    rows = np.kron(np.eye(12), np.ones(12))
    columns = np.kron(np.ones(12), np.eye(12))
    plan = linprog(
        torch.cdist(atoms, atoms).flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=np.r_[source, sink]
    )
    assert exact_wasserstein_dependency(x, y, p) == pytest.approx(plan.fun, abs=1e-6)


def test_2_independent_inputs_have_measure_zero():
    x, y = torch.randn(3, 2, generator=seeded()), torch.randn(4, 2, generator=seeded(1))
    p = torch.outer(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert exact_wasserstein_dependency(x, y, p.double() / p.double().sum()) == pytest.approx(0, abs=1e-7)
    x, y = torch.randn(3000, 1, generator=seeded()), torch.randn(3000, 1, generator=seeded(1))
    found = wasserstein_dependency(x, y, steps=200, batch_size=64, generator=seeded())
    assert abs(found.wasserstein) < 0.05


def test_2_scaling_scales_and_translation_changes_nothing(pairs):
    x, y = pairs
    exact, estimate = exact_wasserstein_dependency, wasserstein_dependency
    assert exact(3 * x, 3 * y) == pytest.approx(3 * exact(x, y), rel=1e-8)
    assert exact(x + 5, y - 7) == pytest.approx(exact(x, y), rel=1e-8)
    x = torch.randn(100, 2, dtype=torch.float64, generator=seeded())
    plain, scaled, moved = (
        estimate(*both, steps=20, batch_size=16, generator=seeded()).wasserstein
        for both in ((x, x), (3 * x, 3 * x), (x + 5, x - 7))
    )
    assert scaled == pytest.approx(3 * plain, rel=1e-6) and moved == pytest.approx(plain, rel=1e-6)


def test_3_measure_is_symmetric_and_at_most_the_coupling_that_keeps_x(pairs):
    x, y = pairs
    found = exact_wasserstein_dependency(x, y)
    assert found == pytest.approx(exact_wasserstein_dependency(y, x), rel=1e-8)
    assert 0 < found <= float(torch.cdist(y, y).mean()) + 1e-9
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=seeded(3))).Q
    assert found == pytest.approx(exact_wasserstein_dependency(x @ rotation, y), rel=1e-8)


@pytest.mark.parametrize("options", [{"lam": 0.0}, {"lipschitz": None}, {"lipschitz": None, "lam": 3.0}])
def test_4_without_penalty_it_is_cross_entropy_to_the_bit(pairs, encoders, options):
    x, y = pairs
    g, h = encoders
    loss = WassersteinDependency(g, h, **options)(x, y)
    assert torch.equal(loss, F.cross_entropy(g(x) @ h(y).T, torch.arange(12)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_4_bound_is_at_most_log_b(pairs, encoders, scale):
    x, y = pairs
    measure = WassersteinDependency(*encoders, lipschitz=None)
    found = measure.diagnose(scale * x, y)
    assert found.info_nce <= math.log(12) + 1e-12 and found.saturation <= 1 + 1e-12
    assert found.info_nce == pytest.approx(math.log(12) - float(measure(scale * x, y).detach()), abs=1e-12)


def test_5_penalty_of_a_linear_critic_is_that_of_both_gradients_together(pairs):
    x, y = pairs
    critic = ConcatCritic(5, 3, ()).double()
    w, v = critic[0].weight[0].split([5, 3])
    for scale in ((1.0, 1.0), (2.0, 0.5)):
        measure = WassersteinDependency(nn.Identity(), nn.Identity(), critic=critic, metric_scale=scale)
        norm = ((w / scale[0]).square().sum() + (v / scale[1]).square().sum()).sqrt()
        found = measure.penalty(x, y, generator=seeded())
        assert torch.allclose(found, (norm - 1).square(), rtol=1e-12)
        assert not torch.allclose(found, ((w / scale[0]).norm() - 1).square() + ((v / scale[1]).norm() - 1).square())
    with torch.no_grad():
        critic[0].weight.mul_(0.5 / critic[0].weight.norm())
    one_sided = WassersteinDependency(nn.Identity(), nn.Identity(), critic=critic, lipschitz="one_sided_gp")
    assert one_sided.penalty(x, y) == 0 and measure.penalty(x, y) > 0


def test_5_scores_of_all_pairs_are_those_of_pairs(pairs, encoders):
    x, y = pairs
    torch.manual_seed(1)
    for critic in ("bilinear", ConcatCritic(4, 4).double()):
        measure = WassersteinDependency(*encoders, critic=critic)
        expected = torch.stack([measure.values(x[i].expand(12, -1), y) for i in range(12)])
        assert torch.allclose(measure.scores(x, y), expected, atol=1e-12)


@pytest.mark.parametrize("lipschitz", ["gp", "one_sided_gp"])
def test_6_penalty_reaches_the_encoders_as_finite_differences_tell(pairs, lipschitz):
    torch.manual_seed(3)
    x, y = pairs
    measure = WassersteinDependency(encoder(5), encoder(3), lipschitz=lipschitz)
    with torch.no_grad():
        for weight in measure.parameters():
            weight.mul_(2)
    penalty = measure.penalty(x, y, generator=seeded())
    gradients = torch.autograd.grad(penalty, list(measure.parameters()), materialize_grads=True)
    assert float(gradients[0].norm()) > 1e-3
    for weight, gradient in zip(measure.parameters(), gradients, strict=True):
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=seeded(1))
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * 1e-5)
            moved.append(float(measure.penalty(x, y, generator=seeded())))
            with torch.no_grad():
                weight.add_(direction, alpha=-sign * 1e-5)
        assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-7)


def test_6_points_lie_between_pairs_and_random_pairs_in_input_space(pairs):
    """A critic x . y has the gradient (y, x), so its norms tell where they were taken."""
    x, y = pairs[1], pairs[1] + 3
    norms = WassersteinDependency(nn.Identity(), nn.Identity()).gradient_norms(x, y, generator=seeded())
    squared = norms.square() - x.square().sum(1)
    generator = seeded()
    other, u = y[derangement(12, generator)], torch.rand(12, dtype=torch.float64, generator=generator)
    assert torch.allclose(squared, (u[:, None] * y + (1 - u[:, None]) * other).square().sum(1), rtol=1e-10)
    assert all(not (derangement(n, seeded(n)) == torch.arange(n)).any() for n in range(2, 30))


def test_6_dropout_keeps_samples_apart_and_batch_norm_is_refused(pairs):
    x, y = pairs
    torch.manual_seed(0)
    measure = WassersteinDependency(nn.Sequential(encoder(5), nn.Dropout(0.5)), encoder(3)).train()
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measure.values(at, y)[4], at)
    assert bool((gradient[torch.arange(12) != 4] == 0).all()) and float(gradient[4].norm()) > 0
    measure(x, y).backward()
    assert all(weight.grad.isfinite().all() for weight in measure.parameters())
    normed = nn.Sequential(encoder(5), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="layer or group norm"):
        WassersteinDependency(normed, encoder(3))
    WassersteinDependency(normed, encoder(3), lipschitz=None)


def test_6_attention_and_recurrent_encoders_can_be_penalised():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
            self.recur = nn.GRU(4, 3, batch_first=True)

        def forward(self, x):
            return self.recur(self.mix(x))[0][:, -1]

    torch.manual_seed(0)
    x = torch.randn(6, 5, 4)
    measure = WassersteinDependency(Last(), Last())
    measure(x, x + 0.1, generator=seeded()).backward()
    assert all(weight.grad.isfinite().all() for weight in measure.parameters())
    assert float(measure.g.mix.self_attn.in_proj_weight.grad.norm()) > 0


def test_7_training_brings_gradient_norms_to_one_and_plain_coding_lets_them_grow():
    tables = torch.randn(2, 4, 4, 6, generator=seeded())
    found = {}
    for lipschitz in ("gp", None):
        generator = seeded(1)

        def draw(n, generator=generator):
            chosen = torch.randint(4, (n, 4), generator=generator)
            return tables[:, torch.arange(4), chosen].flatten(2)

        torch.manual_seed(0)
        measure = WassersteinDependency(*(encoder(24, 8, 64, nn.ReLU).float() for _ in range(2)), lipschitz=lipschitz)
        optimiser = torch.optim.Adam(measure.parameters(), lr=1e-3)
        for _ in range(400):
            optimiser.zero_grad()
            measure(*draw(16), generator=generator).backward()
            optimiser.step()
        found[lipschitz] = float(measure.diagnose(*draw(500)).gradient_norms.mean())
    assert found["gp"] == pytest.approx(1, abs=0.3)
    assert found[None] > 3 * found["gp"]


@pytest.mark.parametrize("critic", ["bilinear", "concat"])
def test_spectral_critics_are_lipschitz(critic):
    """Secants between random and close points, and the norm of a convolution's whole matrix."""
    torch.manual_seed(0)
    g, h = (
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 5))
        for _ in range(2)
    )  # fmt: skip
    own = ConcatCritic(5, 5) if critic == "concat" else critic
    measure = WassersteinDependency(g, h, critic=own, lipschitz="spectral")
    x = torch.randn(64, 1, 6, 6, generator=seeded())
    for _ in range(50):
        measure(x, x)
    measure.eval()
    matrix = torch.autograd.functional.jacobian(g[0], x[:1]).view(144, 36)
    assert 0.3 < float(torch.linalg.matrix_norm(matrix, 2)) <= 1.001
    assert float(measure.gradient_norms(100 * x, 100 * x).max()) <= 1.001
    assert float(measure.gradient_norms(x, x).max()) > 1e-4
    with torch.no_grad():
        g[4].parametrizations.weight.original.mul_(100)
        measure.train()
        measure(x, x)
        measure.eval()
    assert float(measure.gradient_norms(100 * x, 100 * x).max()) <= 1.001


def test_spectral_bilinear_critic_reaches_slope_one_and_no_more():
    x = torch.zeros(5, 3)
    x[:, 0] = 0.999
    measure = WassersteinDependency(nn.Identity(), nn.Identity(), lipschitz="spectral")
    assert torch.allclose(measure.gradient_norms(x, x), torch.full((5,), 0.999))


def test_spectral_refuses_what_may_expand_distances():
    for layer in (nn.GELU(), nn.LayerNorm(4), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match="spectral bounds hold"):
            WassersteinDependency(nn.Sequential(nn.Linear(4, 4), layer), nn.Linear(4, 4), lipschitz="spectral")


def test_order_of_pairs_changes_no_score(pairs, encoders):
    x, y = pairs
    measure, order = WassersteinDependency(*encoders).train(), torch.randperm(12, generator=seeded())
    one, two = measure.diagnose(x, y), measure.diagnose(x[order], y[order])
    assert measure.training
    assert one.wasserstein == pytest.approx(two.wasserstein, abs=1e-12)
    assert one.info_nce == pytest.approx(two.info_nce, abs=1e-12)
    scores = measure.scores(x, y)
    assert one.wasserstein == pytest.approx(float(scores.diagonal().mean() - (scores.sum() - scores.trace()) / 132))
    assert len(measure.diagnose(x, y, batch_size=5).joint_scores) == 10
    assert one.plot().axes


def test_dual_is_the_difference_of_mean_scores(pairs, encoders):
    x, y = pairs
    measure = WassersteinDependency(*encoders, objective="dual", lam=0.5)
    generator = seeded()
    other = y[derangement(12, generator)]
    expected = measure.values(x, other).mean() - measure.values(x, y).mean()
    expected = expected + 0.5 * measure.penalty(x, y, generator=generator)
    assert torch.allclose(measure(x, y, generator=seeded()), expected)


@pytest.mark.parametrize("lipschitz", ["gp", "spectral"])
def test_saved_encoders_score_as_before(pairs, tmp_path, lipschitz):
    x, y = pairs[0], pairs[0] + 1
    torch.manual_seed(0)
    shared = encoder(5)
    measure = WassersteinDependency(shared, shared, critic=ConcatCritic(4, 4).double(), lipschitz=lipschitz, lam=2.0)
    measure(x, y).backward()
    measure.eval().save_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = encoder(5)
    loaded = WassersteinDependency.from_pretrained(tmp_path, fresh, fresh, critic=ConcatCritic(4, 4).double()).eval()
    assert torch.equal(loaded.scores(x, y), measure.scores(x, y)) and loaded.lam == 2.0
    with pytest.raises(ValueError, match="give a critic if"):
        WassersteinDependency.from_pretrained(tmp_path, shared, shared)
    with pytest.raises(ValueError, match="holds no saved"):
        WassersteinDependency.from_pretrained(tmp_path / "nowhere", shared, shared)
    other = encoder(5, width=9)
    with pytest.raises(ValueError, match="of other encoders"):
        WassersteinDependency.from_pretrained(tmp_path, other, other, critic=ConcatCritic(4, 4).double())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_exact_measure_holds_in_any_unit_and_at_any_offset(pairs, scale, offset):
    x, y = (one.float() for one in pairs)
    far = [(scale * one.double() + offset * scale).to(torch.float64) for one in (x, y)]
    expected = scale * exact_wasserstein_dependency(x, y)
    assert exact_wasserstein_dependency(*far) == pytest.approx(expected, rel=1e-6)
    narrow = [one.float() for one in far]
    assert exact_wasserstein_dependency(*narrow) == pytest.approx(
        exact_wasserstein_dependency(*(one.double() for one in narrow)), rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("critic", ["bilinear", "concat"])
@pytest.mark.parametrize("objective", ["info_nce", "dual"])
def test_half_precision_gives_the_losses_of_its_numbers(pairs, encoders, dtype, critic, objective):
    torch.manual_seed(2)
    own = ConcatCritic(4, 4) if critic == "concat" else critic
    half = WassersteinDependency(*(one.to(dtype) for one in encoders), critic=own, objective=objective, lam=2.0).to(
        dtype
    )
    x, y = (one.to(dtype) for one in pairs)
    full = copy.deepcopy(half).double()
    losses = [one(a, b, generator=seeded()) for one, a, b in ((half, x, y), (full, x.double(), y.double()))]
    rounding = 40 * torch.finfo(dtype).eps
    # The points between pairs are drawn in the dtype, so that those of float64 are others.
    without = [one.values(a, b).mean() for one, a, b in ((half, x, y), (full, x.double(), y.double()))]
    assert losses[0].dtype == without[0].dtype == torch.float32
    assert float(without[0].detach()) == pytest.approx(float(without[1].detach()), abs=rounding)
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=0.1)
    losses[0].backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in half.parameters())
    found, expected = half.diagnose(x, y), full.diagnose(x.double(), y.double())
    assert found.info_nce == pytest.approx(expected.info_nce, abs=rounding)
    assert found.wasserstein == pytest.approx(expected.wasserstein, abs=rounding)


def test_losses_of_half_precision_codes_are_summed_in_float32():
    """A thousand codes of 60 add up to more than float16 can hold, and to digits that bfloat16 does not have."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((4, 1000), 8.0, dtype=dtype)
        x[:, 0] = torch.tensor([8.0, 8.5, 9.0, 9.5], dtype=dtype)
        measure = WassersteinDependency(nn.Identity(), nn.Identity(), lam=0.0)
        expected = F.cross_entropy(x.double() @ x.double().T, torch.arange(4))
        assert float(measure(x, x)) == pytest.approx(float(expected), rel=1e-6)
        norms = measure.gradient_norms(64 * x[:, :1] + 200, 64 * x[:, :1])
        assert bool(norms.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_estimate_is_that_of_the_same_numbers_in_float64_wherever_they_lie(dtype):
    x = (torch.randn(200, 2, generator=seeded()) * 3).to(dtype)
    far = (x.float() + 1e5) if dtype == torch.float32 else x
    exact = far.double() - (1e5 if dtype == torch.float32 else 0)
    options = {"steps": 30, "batch_size": 16, "learning_rate": 0.01}
    found, expected = (wasserstein_dependency(one, one, generator=seeded(), **options) for one in (far, exact.float()))
    assert found.gradient_norms.dtype == torch.float32
    assert found.wasserstein == pytest.approx(expected.wasserstein, rel=1e-3) and found.wasserstein > 0.1
    torch.manual_seed(0)
    own = ConcatCritic(2, 2, (8,))
    assert math.isfinite(wasserstein_dependency(far, far, critic=own, generator=seeded(), **options).wasserstein)


def test_diagnosing_leaves_each_module_in_its_mode(pairs, encoders):
    measure = WassersteinDependency(nn.Sequential(encoders[0], nn.Dropout(0.5)), encoders[1]).train()
    measure.g[1].eval()
    measure.diagnose(*pairs)
    assert measure.training and measure.g.training and not measure.g[1].training


def test_critics_give_one_score_a_pair(pairs, encoders):
    class Column(ConcatCritic):
        def forward(self, gx, hy):
            return super().forward(gx, hy)[:, None]

    class Mean(ConcatCritic):
        def forward(self, gx, hy):
            return super().forward(gx, hy).mean()

    torch.manual_seed(0)
    plain = ConcatCritic(4, 4).double()
    column = Column(4, 4).double()
    column.load_state_dict(plain.state_dict())
    one, other = (WassersteinDependency(*encoders, critic=critic) for critic in (plain, column))
    assert torch.equal(one.scores(*pairs), other.scores(*pairs)) and torch.equal(
        one.values(*pairs), other.values(*pairs)
    )
    with pytest.raises(ValueError, match="one score for each of its 12 pairs"):
        WassersteinDependency(*encoders, critic=Mean(4, 4).double()).values(*pairs)


def test_damaged_folders_are_one_clear_sentence(pairs, encoders, tmp_path):
    measure = WassersteinDependency(*encoders)
    for spoil in ("config.json", "model.safetensors"):
        measure.save_pretrained(tmp_path)
        (tmp_path / spoil).write_bytes(b"{}")
        with pytest.raises(ValueError, match="holds no saved WassersteinDependency"):
            WassersteinDependency.from_pretrained(tmp_path, *encoders)


def test_bad_input_is_one_clear_sentence(pairs, encoders):
    x, y = pairs
    for options, words in (
        ({"lipschitz": "clip"}, "lipschitz is one of"),
        ({"objective": "kl"}, "objective info_nce or dual"),
        ({"lam": -1.0}, "lam is a finite"),
        ({"lam": math.inf}, "lam is a finite"),
        ({"metric_scale": (1.0, math.inf)}, "metric_scale is two"),
        ({"metric_scale": (1.0, 1.0, 1.0)}, "metric_scale is two"),
        ({"lam": 0.0, "objective": "dual"}, "as large as it likes"),
        ({"metric_scale": (1.0, 0.0)}, "metric_scale is two"),
        ({"metric_scale": (1.0, 2.0), "lipschitz": "spectral"}, "leave metric_scale"),
        ({"lipschitz": None, "objective": "dual"}, "as large as it likes"),
    ):
        with pytest.raises(ValueError, match=words):
            WassersteinDependency(*encoders, **options)
    with pytest.raises(TypeError, match="critic is 'bilinear' or"):
        WassersteinDependency(*encoders, critic="concat")
    measure = WassersteinDependency(*encoders)
    for both, words in (
        ((x[:1], y[:1]), "two or more pairs"),
        ((x, y[:5]), "as many of the one"),
        ((x * float("nan"), y), "NaN"),
        ((x, torch.where(y == y.max(), math.inf, y)), "NaN or infinity"),
    ):
        for call in (measure, measure.diagnose):
            with pytest.raises(ValueError, match=words):
                call(*both)
    with pytest.raises(TypeError, match="embed discrete inputs"):
        measure(x.long(), y)
    with pytest.raises(ValueError, match="takes one d for both"):
        WassersteinDependency(encoder(5), encoder(3, 6))(x, y)
    with pytest.raises(ValueError, match="batch_size is from 2"):
        measure.diagnose(x, y, batch_size=13)
    for both, options, words in (
        ((x, y), {"held_out": 1.0}, "held_out lies"),
        ((x, y), {"held_out": 0.0}, "held_out lies"),
        ((x, y), {"batch_size": 1}, "batch_size at least 2"),
        ((x, y), {"learning_rate": math.inf}, "learning_rate above 0"),
        ((x[:4], y[:4]), {}, "4 pairs leave fewer than two"),
        ((x[:4], y[:4]), {"held_out": 0.75}, "4 pairs leave fewer than two"),
        ((x[:0], y[:0]), {}, "inputs are empty"),
        ((x, y * float("nan")), {}, "NaN or infinity"),
        ((x, y), {"steps": 0}, "steps is at least"),
        ((x, y), {"learning_rate": 0.0}, "learning_rate above 0"),
        ((x * 0 + 0.1, y * 0 + 0.3), {}, "both inputs are constant"),
        ((x, y[:3]), {}, "as many of each"),
        ((x[:3], y[:3]), {}, "fewer than two"),
        ((x * 0, y * 0), {}, "both inputs are constant"),
        ((x * float("inf"), y), {}, "NaN or infinity"),
        ((x, y), {"critic": ConcatCritic(5, 3).half()}, r"float16 .* give critic.float\(\)"),
        ((x, y), {"critic": ConcatCritic(5, 3).bfloat16()}, r"bfloat16 .* give critic.float\(\)"),
        ((x.float(), y.float()), {"learning_rate": 1e36, "steps": 5}, "diverged"),
    ):
        with pytest.raises(ValueError, match=words):
            wasserstein_dependency(*both, **options)
    with pytest.raises(TypeError, match="embed discrete"):
        wasserstein_dependency(x.long(), y)
    for call in (measure, measure.diagnose, wasserstein_dependency, exact_wasserstein_dependency):
        for both, words in (((x.numpy(), y), "got ndarray"), ((x, torch.tensor(1.0)), "a single number")):
            with pytest.raises(TypeError, match=words):
                call(*both)
    signed = torch.eye(12) / 12 + torch.outer(torch.eye(12)[0] - torch.eye(12)[1], torch.eye(12)[5])
    for p, words in (
        (torch.ones(2, 2) / 4, "for 12 x 12"),
        (torch.full((12, 12), 1.0), "add up to 1"),
        (torch.eye(12) / 12 * (1 - 1e-4), "add up to 1"),
        (signed, "holds probabilities"),
    ):
        with pytest.raises(ValueError, match=words):
            exact_wasserstein_dependency(x, y, p)
    with pytest.raises(ValueError, match="as many of each"):
        exact_wasserstein_dependency(x, y[:4])
    with pytest.raises(ValueError, match="atoms hold NaN"):
        exact_wasserstein_dependency(x * float("nan"), y)


def test_defaults_are_those_of_the_signature_that_is_documented():
    measure = WassersteinDependency(nn.Identity(), nn.Identity())
    assert (measure.lipschitz, measure.lam, measure.metric_scale, measure.objective) == ("gp", 10, (1, 1), "info_nce")
    assert [layer.out_features for layer in ConcatCritic(3, 2) if isinstance(layer, nn.Linear)] == [64, 64, 1]
    defaults = {name: one.default for name, one in inspect.signature(wasserstein_dependency).parameters.items()}
    assert (defaults["lipschitz"], defaults["lam"], defaults["steps"]) == ("one_sided_gp", 100, 3000)
    assert (defaults["learning_rate"], defaults["batch_size"], defaults["held_out"]) == (1e-3, 256, 0.25)


@pytest.mark.parametrize("slope", [0.5, 1.5])
def test_diagnosis_is_worked_out_within_batches_and_divided_by_slopes_above_1(pairs, slope):
    x, y = pairs
    critic = ConcatCritic(5, 3, ()).double()
    with torch.no_grad():
        critic[0].weight.mul_(slope / critic[0].weight.norm())
    measure = WassersteinDependency(nn.Identity(), nn.Identity(), critic=critic)
    found = measure.diagnose(x, y, batch_size=5)
    joint, product, bound = [], [], []
    for start in (0, 5):
        scores = torch.stack(
            [measure.values(x[i].expand(5, -1), y[start : start + 5]) for i in range(start, start + 5)]
        )
        joint += scores.diag().tolist()
        product += scores[~torch.eye(5, dtype=torch.bool)].tolist()
        bound += (scores.diag() - scores.exp().sum(1).log()).tolist()
    assert found.joint_scores.tolist() == pytest.approx(joint) and found.product_scores.tolist() == pytest.approx(
        product
    )
    assert found.info_nce == pytest.approx(math.log(5) + np.mean(bound)) and found.batch_size == 5
    assert found.saturation == pytest.approx(found.info_nce / math.log(5))
    assert found.wasserstein == pytest.approx(np.mean(joint) - np.mean(product))
    assert found.conservative == pytest.approx(found.wasserstein / max(1, slope))
    assert found.gradient_norms.tolist() == pytest.approx([slope] * 12)
    assert not found.gradient_norms.requires_grad and found.joint_scores.dtype == torch.float64
    assert measure.diagnose(x, y, batch_size=2).batch_size == 2 and measure.diagnose(x, y).batch_size == 12


def test_two_pairs_are_enough_and_classes_of_a_free_critic_may_be_whole_numbers():
    g, h = nn.Embedding(5, 3), nn.Embedding(5, 3)
    x = torch.tensor([1, 4])
    loss = WassersteinDependency(g, h, lipschitz=None)(x, x)
    assert torch.equal(loss, F.cross_entropy(g(x) @ h(x).T, torch.arange(2)))
    assert math.isfinite(WassersteinDependency(nn.Identity(), nn.Identity())(torch.eye(2), torch.eye(2)))


@pytest.mark.parametrize("limit, sizes", [(30, [24] * 6), (5, [12] * 12), (1000, [144])])
def test_all_pairs_are_scored_so_many_at_once(pairs, encoders, monkeypatch, limit, sizes):
    seen = []

    class Seen(ConcatCritic):
        def forward(self, gx, hy):
            seen.append(len(gx))
            return super().forward(gx, hy)

    measure = WassersteinDependency(*encoders, critic=Seen(4, 4).double())
    expected = measure.scores(*pairs)
    seen.clear()
    monkeypatch.setitem(WassersteinDependency.scores.__globals__, "_PAIRS_AT_ONCE", limit)
    assert torch.allclose(measure.scores(*pairs), expected, rtol=1e-12) and seen == sizes


def test_derangement_is_one_cycle_through_all():
    for size in (2, 3, 8, 9):
        found, at = derangement(size, seeded(size)), 0
        for _ in range(size - 1):
            at = int(found[at])
            assert at != 0
        assert int(found[at]) == 0
    with pytest.raises(ValueError, match="got 1 in all"):
        derangement(1)


@pytest.mark.parametrize(
    "layer, patches",
    [
        (nn.Conv2d(2, 3, 3, padding=1), 9), (nn.Conv2d(2, 3, 3, stride=2), 4), (nn.Conv2d(2, 3, (4, 3), stride=(2, 3)), 2),
        (nn.Conv1d(2, 3, 3, stride=3), 1), (nn.Conv1d(2, 3, 5, padding=2, padding_mode="circular"), 5), (nn.Linear(4, 3), 1),
    ],
)  # fmt: skip
def test_spectral_norms_are_one_over_the_root_of_patches_that_a_pixel_lies_in(layer, patches):
    own = copy.deepcopy(layer)
    measure = WassersteinDependency(
        nn.Sequential(own, nn.Sigmoid(), nn.Softplus()), nn.Identity(), lipschitz="spectral"
    )
    for _ in range(200):
        _ = own.weight
    measure.eval()
    assert float(torch.linalg.matrix_norm(own.weight.flatten(1), 2)) == pytest.approx(patches**-0.5, rel=1e-3)


def test_batch_norm_is_taken_where_nothing_is_penalised(pairs):
    normed = nn.Sequential(encoder(5), nn.BatchNorm1d(4).double())
    assert math.isfinite(float(WassersteinDependency(normed, encoder(3), lam=0.0)(*pairs).detach()))


def test_saved_settings_come_back(encoders, tmp_path):
    options = {"lipschitz": "one_sided_gp", "lam": 3.0, "metric_scale": (2.0, 0.5), "objective": "dual"}
    WassersteinDependency(*encoders, **options).save_pretrained(tmp_path / "new" / "folder")
    loaded = WassersteinDependency.from_pretrained(tmp_path / "new" / "folder", *encoders)
    assert {name: getattr(loaded, name) for name in options} == options and loaded.critic is None
    with pytest.raises(ValueError, match="give a critic if and only if"):
        WassersteinDependency.from_pretrained(tmp_path / "new" / "folder", *encoders, critic=ConcatCritic(4, 4))


@pytest.mark.parametrize("held_out, told", [(0.25, 10), (0.5, 20), (0.1, 4)])
def test_estimate_is_read_off_held_out_pairs_in_the_units_of_the_data(held_out, told):
    x = 7 * torch.randn(40, 2, dtype=torch.float64, generator=seeded()) + 3
    found = wasserstein_dependency(
        x, x, steps=20, batch_size=8, held_out=held_out, learning_rate=0.05, generator=seeded()
    )
    assert len(found.gradient_norms) == told and found.batch_size == min(8, told)
    batches = told // found.batch_size
    assert len(found.joint_scores) == batches * found.batch_size
    assert len(found.product_scores) == batches * found.batch_size * (found.batch_size - 1)
    assert found.wasserstein == pytest.approx(float(found.joint_scores.mean() - found.product_scores.mean()))
    assert found.conservative == pytest.approx(found.wasserstein / max(1, float(found.gradient_norms.max())))


def test_critic_is_shown_centred_data_of_root_mean_squared_size_1():
    x = 5 * torch.randn(16, 2, 2, dtype=torch.float64, generator=seeded()) + 100
    y = torch.randn(16, 1, dtype=torch.float64, generator=seeded(1)) - 30
    both = torch.cat([x.flatten(1), y], 1)
    both = both - both.mean(0)
    both = both / both.square().sum(1).mean().sqrt()
    seen = []

    class Seen(ConcatCritic):
        def forward(self, gx, hy):
            seen.append((gx.detach(), hy.detach()))
            return super().forward(gx, hy)

    wasserstein_dependency(x, y, critic=Seen(4, 1).double(), steps=30, batch_size=4, generator=seeded())
    gx, first = torch.cat([one for one, _ in seen]), torch.cat([two for _, two in seen[-2:]])
    assert float(torch.cdist(gx, both[:, :4]).min(1).values.max()) < 1e-6
    # All pairs are shown, some to train and the others to evaluate on.
    assert float(torch.cdist(both[:, :4], gx).min(1).values.max()) < 1e-6
    assert both[:, 4].min() - 1e-9 <= first.min() and first.max() <= both[:, 4].max() + 1e-9


def test_learning_rate_falls_along_a_cosine():
    """Far from slope 1 each of Adam's steps is as long as the rate, down the penalty."""
    critic = ConcatCritic(1, 1, ()).double()
    with torch.no_grad():
        critic[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
    x = torch.randn(20, 1, dtype=torch.float64, generator=seeded())
    wasserstein_dependency(x, x, critic=critic, steps=4, batch_size=8, learning_rate=1e-5, generator=seeded())
    rates = sum((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))
    assert critic[0].weight[0].tolist() == pytest.approx([3 - 1e-5 * rates, 4 - 1e-5 * rates], abs=2e-8)


def test_generator_settles_weights_and_draws_and_leaves_the_global_one_alone():
    x, options = torch.randn(30, 2, generator=seeded()), {"steps": 3, "batch_size": 4, "learning_rate": 0.1}
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(wasserstein_dependency(x, x, generator=seeded(5), **options).wasserstein)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] != wasserstein_dependency(x, x, generator=seeded(6), **options).wasserstein
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(wasserstein_dependency(x, x, **options).wasserstein)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(wasserstein_dependency(x[:4], x[:4], held_out=0.5, steps=1, batch_size=2).gradient_norms) == 2


def test_exact_measure_of_what_does_not_have_to_travel_is_0():
    one, two = torch.zeros(1, 2), torch.zeros(2, 3)
    assert exact_wasserstein_dependency(one, one, torch.ones(1, 1)) == 0
    assert exact_wasserstein_dependency(two, two, torch.eye(2) / 2) == 0
    x = torch.tensor([[0.0], [2.0]], requires_grad=True)
    p = torch.tensor([[0.5, 0.0], [0.0, 0.5]], requires_grad=True)
    # A quarter travels from each corner that has too much, by 2 in one of the two.
    assert exact_wasserstein_dependency(x, x, p) == pytest.approx(1.0)
    assert exact_wasserstein_dependency(x.half(), x, p.half() + 0) == pytest.approx(1.0)
    assert exact_wasserstein_dependency(x[:, None, None], x) == pytest.approx(1.0)
