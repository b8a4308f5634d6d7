"""Classifiers over one label space: sums are exact in any order, and scores those of formulas written out here."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from recast_pl import LDA, NCM, FeCAM, RanPAC
from recast_pl.errors import RunError
from recast_pl.methods.ranpac import ridge_errors

KINDS = {
    "ncm": NCM,
    "lda": LDA,
    "ranpac": lambda: RanPAC(40, ridge=3.0),
    "ranpac chooses": lambda: RanPAC(40),
    "fecam": FeCAM,
}
WIDTH = 6


def images(classes, count, seed):
    """Features (N, D) and labels (N,) of images of some classes, around random means."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(classes, count))
    means = 3 * np.random.default_rng(0).normal(size=(9, WIDTH)) + 1
    x = means[labels] + generator.normal(size=(len(labels), WIDTH)) * np.linspace(0.3, 3, WIDTH)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


TASKS = [images([0, 1], 20, 1), images([2, 3, 4], 15, 2), images([5, 6, 7, 8], 25, 3)]
X, Y = (torch.cat(parts) for parts in zip(*TASKS, strict=True))
TEST = images(range(9), 5, 4)[0]


def taught(kind, *tasks):
    classifier = KINDS[kind]()
    for task in tasks:
        classifier.update(*task)
    return classifier


def equal(one, other):
    return one.sums.keys() == other.sums.keys() and all(torch.equal(one.sums[n], other.sums[n]) for n in one.sums)


# what holds for every classifier


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tasks_changes_no_bit(kind):
    forwards, backwards = taught(kind, *TASKS), taught(kind, *TASKS[::-1])
    assert equal(forwards, backwards)
    assert torch.equal(forwards.scores(TEST), backwards.scores(TEST))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ranpac chooses"])  # it holds out images of a task
def test_images_one_by_one_give_the_same_as_all_at_once(kind):
    streamed = taught(kind, *((X[i : i + 1], Y[i : i + 1]) for i in torch.randperm(len(X)).tolist()))
    at_once = taught(kind, (X, Y))
    for name, total in at_once.sums.items():
        np.testing.assert_allclose(streamed.sums[name], total, rtol=1e-6, atol=1e-6)
    scale = float(at_once.scores(TEST).abs().max())
    np.testing.assert_allclose(streamed.scores(TEST), at_once.scores(TEST), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", range(3))
def test_a_task_that_was_removed_leaves_nothing(kind, gone):
    classifier = taught(kind, *TASKS)
    classifier.scores(TEST)
    classifier.remove(*TASKS[gone])
    others = [task for place, task in enumerate(TASKS) if place != gone]
    assert equal(classifier, taught(kind, *others))
    found, known = classifier.scores(TEST), torch.cat([labels for _, labels in others]).unique()
    assert found.isfinite().all(0).nonzero()[:, 0].tolist() == known.tolist()
    assert found.shape[1] == known.max() + 1
    for task in others:
        classifier.remove(*task)
    with pytest.raises(RunError, match="has seen no image"):
        classifier.scores(TEST)


@pytest.mark.parametrize("kind", KINDS)
def test_two_machines_merge_to_the_whole(kind):
    one, two = taught(kind, TASKS[0]), taught(kind, *TASKS[1:])
    one.scores(TEST)
    one.merge(two)
    whole = taught(kind, *TASKS)
    assert equal(one, whole)
    assert torch.equal(one.scores(TEST), whole.scores(TEST))
    with pytest.raises(RunError, match="give both the same settings"):
        one.merge(RanPAC(50))


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_one_image_has_finite_scores_and_no_image_none(kind):
    with pytest.raises(RunError, match="has seen no image; call update first"):
        KINDS[kind]().scores(TEST)
    alone = taught(kind, (X[:1], torch.zeros(1, dtype=torch.long)), *TASKS[1:])
    scores = alone.scores(TEST)
    assert scores[:, 1].isneginf().all()
    assert scores[:, [0, 2, 3]].isfinite().all()


# each against its formula


def test_ncm_is_the_nearest_centroid_of_scikit_learn():
    found = taught("ncm", *TASKS).scores(TEST).argmax(1)
    assert found.tolist() == NearestCentroid().fit(X.double(), Y).predict(TEST.double()).tolist()


def test_lda_is_the_discriminant_of_scikit_learn_with_equal_priors():
    x, y = X.double().numpy(), Y.numpy()
    means = np.stack([x[y == label].mean(0) for label in range(9)])
    scatter = sum(np.outer(row - means[label], row - means[label]) for row, label in zip(x, y, strict=True))
    covariance = (1 - 1e-4) * scatter / len(x) + 1e-4 * np.eye(WIDTH)

    class Given:
        def fit(self, _):
            self.covariance_ = covariance
            return self

    lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Given(), priors=np.full(9, 1 / 9)).fit(x, y)
    found = taught("lda", *TASKS).scores(TEST)
    np.testing.assert_allclose(found, lda.decision_function(TEST.double().numpy()) + np.log(9), rtol=1e-6, atol=1e-6)


def lifted(x):
    matrix = torch.randn(WIDTH, 40, generator=torch.Generator().manual_seed(0)).double().numpy()
    return np.maximum(x.double().numpy() @ matrix, 0)


def test_ranpac_is_ridge_regression_on_random_features():
    model = Ridge(alpha=3.0, fit_intercept=False).fit(lifted(X), np.eye(9)[Y.numpy()])
    np.testing.assert_allclose(taught("ranpac", *TASKS).scores(TEST), model.predict(lifted(TEST)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [40, 400])  # fewer random features than images, and more
def test_ranpac_chooses_the_ridge_with_the_least_error_on_held_out_images(width):
    x, labels = TASKS[2]
    h = torch.relu(x.double() @ torch.randn(WIDTH, width, generator=torch.Generator().manual_seed(1)).double())
    held_out, targets = np.arange(len(h)) % 5 == 4, np.eye(9)[labels.numpy()]
    errors = ridge_errors(h, labels)
    for ridge, found in list(zip(10.0 ** np.arange(-8, 9), errors.tolist(), strict=True))[
        6:
    ]:  # the others are ill-posed
        a, b = h.numpy()[~held_out], h.numpy()[held_out]
        weight = np.linalg.solve(a.T @ a + ridge * np.eye(width), a.T @ targets[~held_out])
        assert found == pytest.approx(np.square(b @ weight - targets[held_out]).sum(), rel=1e-4)


def test_ranpac_takes_the_ridge_that_is_best_for_all_tasks_together():
    total = sum(ridge_errors(torch.tensor(lifted(x)), labels) for x, labels in TASKS)
    best = 10.0 ** (int(total.argmin()) - 8)
    model = Ridge(alpha=best, fit_intercept=False).fit(lifted(X), np.eye(9)[Y.numpy()])
    found = taught("ranpac chooses", *TASKS).scores(TEST)
    np.testing.assert_allclose(found, model.predict(lifted(TEST)), rtol=1e-5, atol=1e-5)


def test_fecam_is_the_mahalanobis_distance_by_correlations():
    def unit(x):
        return x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)

    found = taught("fecam", *TASKS).scores(TEST)
    for label in range(9):
        own = unit(X[label == Y])
        covariance = np.cov(own.T)
        covariance += np.trace(covariance) / WIDTH * np.eye(WIDTH)
        deviations = np.sqrt(np.diag(covariance))
        inverse = np.linalg.inv(covariance / np.outer(deviations, deviations))
        apart = unit(TEST) - own.mean(0)
        distance = np.einsum("bi,ij,bj->b", apart, inverse, apart)
        np.testing.assert_allclose(-found[:, label], distance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: LDA(0), "shrinkage=0 must be above 0"),
        (lambda: RanPAC(0), "dimensions=0 must be at least 1"),
        (lambda: RanPAC(5, ridge=-1.0), "ridge=-1.0 above 0 or null"),
        (lambda: FeCAM(-1), "shrinkage=-1 must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, fault):
    with pytest.raises(RunError, match=fault):
        make()
