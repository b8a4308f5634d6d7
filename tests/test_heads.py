"""Heads that are solved: against scikit-learn and brute force in double precision, and through `fit`."""

import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from test_all_methods import VIT, VIT_MLP, fit

import recast_pl.learning.heads as heads
from recast_pl import Recast, TILModule
from recast_pl.cli import main
from recast_pl.learning.features import Features
from recast_pl.learning.heads import class_weights, classification_loss, solve_head
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.trainer import BestEpoch


@pytest.fixture(scope="module")
def digits():
    """Training and test features: the pixels of 600 and of 1,197 digits."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    parts = (order[:600], order[600:])
    return [Features(torch.tensor(x[part], dtype=torch.float32), torch.tensor(y[part])) for part in parts]


def numbers(features):
    return features.features.double().numpy(), features.labels.numpy()


def small(seed=0, images=40, width=6, classes=3):
    """Unequal classes: about half of the images are of the first."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(images, generator=generator) * classes * 1.5 - classes / 2).clamp(0).long()
    labels[:classes] = torch.arange(classes)
    features = torch.randn(images, width, generator=generator) + labels[:, None]
    return Features(features * torch.arange(1, width + 1), labels)


@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regression_is_that_of_scikit_learn(monkeypatch, balanced):
    monkeypatch.setattr(heads, "_DECAYS", [0.01])
    train = small()
    head = solve_head("logistic", train, 3, balanced)
    x, y = numbers(train)
    scale = np.sqrt(x.var(0).mean())
    strength = 1 / (0.01 * len(y))  # scikit-learn sums the losses, and weighs the sum
    reference = LogisticRegression(
        C=strength, tol=1e-8, max_iter=5000, class_weight="balanced" if balanced else None
    ).fit((x - x.mean(0)) / scale, y)
    wanted = reference.predict_proba((x - x.mean(0)) / scale)
    found = softmax(head(train.features).detach().double().numpy(), axis=1)
    assert np.abs(found - wanted).max() < 1e-3


def test_converged_probes_are_as_good_as_scikit_learns(digits):
    train, test = digits
    x, y = numbers(train)
    scale = np.sqrt(x.var(0).mean())
    reference = LogisticRegressionCV(Cs=np.logspace(-3, 2, 6), cv=3, max_iter=3000, scoring="neg_log_loss")
    reference.fit(x / scale, y)
    wanted = np.mean(reference.predict(numbers(test)[0] / scale) == numbers(test)[1])
    accuracy, _ = test.score(solve_head("logistic", train, 10))
    assert abs(accuracy - wanted) <= 0.002


def left_out(learn, x, y):
    """Scores (N, C) of each image by a fit to the others."""
    return np.stack([learn(np.delete(x, i, 0), np.delete(y, i))(x[i : i + 1])[0] for i in range(len(y))])


def chosen(fits, x, y):
    """Index of the fit that recognises most images when each is left out, then has the lowest calibrated loss."""
    results = []
    for candidate in fits:
        scores = left_out(candidate, x, y)
        losses = []
        for temperature in heads._TEMPERATURES.numpy():
            logs = log_softmax(temperature * scores, axis=1)
            losses.append(-(0.99 * logs[range(len(y)), y] + 0.01 * logs.mean(1)).mean())
        results.append((np.mean(scores.argmax(1) == y), -min(losses)))
    return results.index(max(results))


def test_a_discriminant_is_that_of_scikit_learn_with_the_shrinkage_of_leave_one_out():
    train = small(1)
    x, y = numbers(train)
    centred = (x - x.mean(0)) / np.sqrt(x.var(0).mean())

    def discriminant(gamma):
        def learn(x, y):
            means = np.stack([x[y == label].mean(0) for label in range(3)])
            rest = x - means[y]
            covariance = rest.T @ rest / (len(y) - 3)
            shrunk = (1 - gamma) * covariance + gamma * np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
            model = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=_Fixed(shrunk))
            return model.fit(x, y).decision_function

        return learn

    shrinkages = heads._SHRINKAGES.tolist()
    best = shrinkages[chosen([discriminant(gamma) for gamma in shrinkages], centred, y)]
    wanted = discriminant(best)(centred, y)(centred)
    found = solve_head("lda", train, 3)(train.features).detach().double().numpy()
    found, wanted = found - found.mean(1, keepdims=True), wanted - wanted.mean(1, keepdims=True)
    factor = (found * wanted).sum() / (wanted**2).sum()  # the temperature
    assert np.abs(heads._TEMPERATURES.numpy() - factor).min() < 1e-3 * factor
    assert np.abs(found - factor * wanted).max() < 1e-3 * np.abs(found).max()


class _Fixed:
    """A covariance estimator with a given result."""

    def __init__(self, covariance):
        self.covariance_ = covariance

    def fit(self, x):
        return self

    def get_params(self, deep=True):
        return {"covariance": self.covariance_}


def test_a_ridge_is_that_of_scikit_learn_with_the_strength_of_leave_one_out():
    train = small(2)
    x, y = numbers(train)
    centred = (x - x.mean(0)) / np.sqrt(x.var(0).mean())
    values = np.linalg.eigvalsh(centred.T @ centred)
    strengths = values.mean() * heads._SHRINKAGES.numpy() * 10

    def ridge(strength):
        return lambda x, y: Ridge(alpha=strength).fit(x, np.eye(3)[y]).predict

    best = strengths[chosen([ridge(strength) for strength in strengths], centred, y)]
    wanted = ridge(best)(centred, y)(centred)
    found = solve_head("ridge", train, 3)(train.features).detach().double().numpy()
    found, wanted = found - found.mean(1, keepdims=True), wanted - wanted.mean(1, keepdims=True)
    factor = (found * wanted).sum() / (wanted**2).sum()
    assert np.abs(heads._TEMPERATURES.numpy() - factor).min() < 1e-3 * factor
    assert np.abs(found - factor * wanted).max() < 1e-3 * np.abs(found).max()


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
def test_solved_heads_recognise_digits_and_are_calibrated(digits, kind):
    train, test = digits
    accuracy, loss = test.score(solve_head(kind, train, 10))
    assert accuracy > 0.9
    assert loss < 0.35


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
@pytest.mark.parametrize("balanced", [False, True])
def test_any_few_images_give_a_finite_head(kind, balanced):
    for labels in ([0, 1], [0, 0, 1], [0, 1, 2, 2], [0] * 4):
        features = Features(torch.randn(len(labels), 5), torch.tensor(labels))
        head = solve_head(kind, features, max(labels) + 1, balanced)
        assert all(p.isfinite().all() for p in head.parameters())
    equal = Features(torch.ones(4, 5), torch.tensor([0, 0, 1, 1]))
    assert all(p.isfinite().all() for p in solve_head(kind, equal, 2, balanced).parameters())


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
def test_a_head_is_solved_where_lapack_gives_up(kind, monkeypatch):
    """As it does on the scatter of 160 images in 1,280 features of EfficientNet, whose other eigenvalues are all 0."""
    train = small(images=20, width=40)
    wanted = solve_head(kind, train, 3)

    def fails(matrix):
        raise torch.linalg.LinAlgError("too many repeated eigenvalues")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = solve_head(kind, train, 3)
    torch.testing.assert_close(found(train.features), wanted(train.features), rtol=1e-4, atol=1e-4)


def test_the_loss_weighs_classes_and_smooths_labels():
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    weights = class_weights(labels, 3).float()
    assert weights[labels].mean() == pytest.approx(1)
    weighted = torch.nn.functional.cross_entropy(logits, labels, weights)
    assert classification_loss(logits, labels, weights[labels]) == pytest.approx(float(weighted), rel=1e-5)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    assert classification_loss(logits, labels, None, 0.2) == pytest.approx(float(smoothed), rel=1e-5)
    padded = torch.cat([logits, torch.full((8, 2), -torch.inf)], 1)  # heads of other tasks are wider
    assert classification_loss(padded, labels, None, 0.2) == pytest.approx(float(smoothed), rel=1e-5)


def results(run):
    return json.loads((run / "summary.json").read_text())["tasks"]


def test_the_probe_is_solved_and_trains_nothing(tiny_fit, tmp_path):
    run = tmp_path / "run"
    assert main(tiny_fit("--config", "methods/probe.yaml")) == 0
    for task in results(run):
        assert task["accuracy"] == task["probe_accuracy"]
        assert task["epochs"] == 0
        assert "sgd_probe_accuracy" not in task
    assert main(tiny_fit("--config", "methods/probe.yaml", "--model.head", "sgd", run_dir=tmp_path / "sgd")) == 0
    for solved, trained in zip(results(run), results(tmp_path / "sgd"), strict=True):
        assert trained["probe_accuracy"] == solved["probe_accuracy"]
        assert trained["epochs"] == 3
        assert 0 <= trained["sgd_probe_accuracy"] <= 100


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
def test_a_task_never_ends_below_its_solved_head_on_validation_images(data, kind):
    far = {"head": kind, "optimizer": lambda p: torch.optim.SGD(p, lr=1e4)}  # one step destroys the network
    module = TILModule(VIT, [Recast(VIT_MLP)], **far)
    fit(module, data, callbacks=[BestEpoch()])
    pairs = [data.on_after_batch_transfer(batch, 0) for batch in data.plain_dataloader("val")]
    with torch.no_grad():
        found = Features(torch.cat([module.backbone(x) for x, _ in pairs]), torch.cat([y for _, y in pairs]))
    accuracy, loss = found.score(module.head)
    assert (accuracy, -loss) >= (module.probes.start[0], -module.probes.start[1] - 1e-5)


def test_a_task_that_gains_nothing_keeps_the_pretrained_coefficients(data):
    module = TILModule(VIT, [Recast(VIT_MLP)], optimizer=lambda p: torch.optim.SGD(p, lr=1e30))  # not a number
    patch = fit(module, data, callbacks=[BestEpoch()])
    pretrained = torch.cat([bank.coefficients.mean(1).flatten() for bank in module.pieces[0].decomposition.banks])
    assert patch.pieces[0]["coefficients"].equal(pretrained)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model.head", "svm"], "svm"),
        (["--model.label_smoothing", "1"], "label_smoothing=1.0"),
        (["--model.head", "lda", "--model.label_smoothing", "0.1"], "head lda"),
    ],
)
def test_wrong_options_of_a_head_are_refused_in_one_line(tiny_fit, capsys, words, named):
    assert main(tiny_fit(*words)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert named in error


def test_options_of_a_head_reach_training(tiny_fit, tmp_path):
    more = ["--model.balanced", "true", "--model.label_smoothing", "0.1"]
    for kind in ("sgd", "logistic"):
        runs = [tmp_path / kind / name for name in ("plain", "weighted")]
        for run, options in zip(runs, ([], more), strict=True):
            assert main(tiny_fit("--model.head", kind, *options, run_dir=run)) == 0
        one, other = (TaskPatch.load(run / "patches" / "00_first.safetensors") for run in runs)
        assert not one.head["weight"].equal(other.head["weight"])
        assert 0 <= results(runs[1])[0]["balanced_accuracy"] <= 100


@torch.no_grad()
def split_features(module, data, split):
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.plain_dataloader(split)]
    return Features(torch.cat([module.backbone(x) for x, _ in batches]), torch.cat([y for _, y in batches]))


def test_the_kept_head_is_the_solved_one_of_the_kept_features(data):
    module, best = TILModule(VIT, [Recast(VIT_MLP)], head="ridge"), BestEpoch()
    module.activate(fit(module, data, callbacks=[best]))
    train, val = (split_features(module, data, split) for split in ("train", "val"))
    solved = solve_head("ridge", train, len(module.classes))
    torch.testing.assert_close(module.head.weight, solved.weight, atol=1e-3, rtol=1e-2)
    assert best.score == pytest.approx(val.score(solved), abs=1e-3)
