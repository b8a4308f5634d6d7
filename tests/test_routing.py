"""Signatures and the router: exact sums, a discriminant checked by hand, and commands that find tasks."""

import csv
import json
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VIT
from scipy.optimize import minimize_scalar
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import recast_pl
from recast_pl import Router, Signature
from recast_pl.cli import main
from recast_pl.data.images import decode_any
from recast_pl.errors import DataError, PatchError, RunError
from recast_pl.files import pack_tensors
from recast_pl.inference.prediction import find_candidates
from recast_pl.learning.features import Features
from recast_pl.learning.router import Routes, fit_temperature, precision_matrix, task_probabilities
from recast_pl.learning.scatter import Scatter

BASE, OTHER = "a" * 64, "b" * 64
CLIPART = ROOT / "data" / "clipart"


def features(classes, images, seed, width=6, centre=0.0, spread=3.0):
    """Images of classes around random means, with different variances by direction; in a random order."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(classes), images))
    means = centre + spread * generator.normal(size=(classes, width))
    x = means[labels] + generator.normal(size=(len(labels), width)) * np.linspace(0.3, 3, width)
    return Features(torch.tensor(x, dtype=torch.float32), torch.tensor(labels))


def part(whole, chosen):
    return Features(whole.features[chosen], whole.labels[chosen])


def sign(train, name="task", classes=3, val=None, base=BASE, size=32):
    names = [f"class{label}" for label in range(classes)]
    return Signature.of(train, train if val is None else val, name, names, base, size)


def by_numpy(train):
    """Counts, means and scatter in one go, in double precision."""
    x, y = train.features.double().numpy(), train.labels.numpy()
    means = np.stack([x[y == label].mean(0) for label in np.unique(y)])
    own = x - means[y]
    return np.bincount(y), means, own.T @ own


def stream():
    """The training features and the signatures of three tasks."""
    trains = {
        name: features(classes, 20, seed) for seed, (name, classes) in enumerate({"a": 2, "b": 3, "c": 4}.items())
    }
    signatures = {
        name: sign(train, name, int(train.labels.max()) + 1, features(2, 40, 9 + len(name)))
        for name, train in trains.items()
    }
    return trains, signatures


# signatures


def test_a_signature_is_the_sums_of_all_images_in_any_order():
    train = features(3, 1500, 0)  # more than are converted to double precision at a time
    counts, means, scatter = by_numpy(train)
    shuffled = part(train, torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(1)))
    for signature in (sign(train), sign(shuffled)):
        np.testing.assert_array_equal(signature.counts, counts)
        np.testing.assert_allclose(signature.means, means, rtol=1e-6)
        np.testing.assert_allclose(signature.scatter.matrix, scatter, rtol=1e-6, atol=1e-6 * np.trace(scatter))


@pytest.mark.parametrize(("images", "kept"), [(20, True), (140, False)])
def test_a_scatter_is_exact_to_a_millionth_and_small(images, kept):
    whole = features(3, images, 0, width=384)  # fewer images than features are kept themselves
    exact = by_numpy(whole)[2]
    merged = sign(part(whole, slice(50))).merged(sign(part(whole, slice(50, None))))
    for signature in (sign(whole), merged):
        matrix, values = signature.scatter.matrix, signature.scatter.values
        np.testing.assert_allclose(matrix, exact, rtol=0, atol=1e-6 * np.trace(exact))
        assert np.linalg.norm(matrix - exact, 2) < 1e-4 * np.linalg.norm(exact, 2)
        assert torch.equal(matrix * 2.0**30, (matrix * 2.0**30).round())
        assert (values.ndim == 2) == kept
        assert values.nbytes <= 2 * 384 * min(3 * images + 3, 385)
    if kept:  # the order of sums changes no bit
        shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
        assert torch.equal(Scatter(shuffled, signature.scatter.exponent).matrix, matrix)


def test_a_signature_of_an_earlier_version_is_read(tmp_path):
    signature = sign(features(3, 2, 0, width=8))
    exact = torch.tensor(by_numpy(features(3, 2, 0, width=8))[2], dtype=torch.float32)
    tensors = signature.tensors | {"scatter": exact[tuple(torch.triu_indices(8, 8))]}  # whatever the number of images
    facts = {name: fact for name, fact in signature.facts.items() if name != "exponent"}
    (tmp_path / "old").write_bytes(pack_tensors(tensors, {"format": 1, "kind": "signature"} | facts))
    old = Signature.load(tmp_path / "old")
    assert torch.equal(old.scatter.matrix, exact.double())
    assert old.merged(signature).counts.tolist() == [4, 4, 4]


@pytest.mark.parametrize("cut", [1, 17, 59])
def test_parts_on_two_machines_merge_to_the_whole(cut):
    whole = features(3, 20, 0)
    first, second = (part(whole, chosen) for chosen in (slice(cut), slice(cut, None)))  # a part may lack a class
    merged, other = sign(first).merged(sign(second)), sign(second).merged(sign(first))
    for each in (merged, other):
        np.testing.assert_array_equal(each.counts, sign(whole).counts)
        np.testing.assert_allclose(each.means, sign(whole).means, rtol=1e-6)
        exact = by_numpy(whole)[2]
        np.testing.assert_allclose(each.scatter.matrix, exact, rtol=1e-6, atol=1e-6 * np.trace(exact))
    assert len(merged.held_out.labels) == 60
    with pytest.raises(PatchError, match="cannot be merged; merge parts of one task"):
        sign(first).merged(sign(second, "another"))


def test_a_signature_comes_back_from_its_file_bit_by_bit(tmp_path):
    signature = sign(features(3, 100, 0), val=features(3, 100, 1))
    signature.save(tmp_path / "signature")
    read = Signature.load(tmp_path / "signature")
    assert read.facts == signature.facts
    assert len(read.held_out.labels) == 256
    assert set(read.held_out.labels.tolist()) == {0, 1, 2}
    for name in ("counts", "means"):
        assert torch.equal(getattr(read, name), getattr(signature, name))
    assert torch.equal(read.scatter.matrix, signature.scatter.matrix)
    assert read.to_bytes() == signature.to_bytes()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"means": torch.zeros(3, 5)}, "needs"),
        ({"counts": torch.tensor([1, -1, 2], dtype=torch.int32)}, "negative"),
        ({"labels": torch.full((60,), 3)}, "beyond the classes"),
        ({"scatter": torch.full((21,), torch.nan)}, "NaN"),
        ({"scatter": torch.zeros(20)}, "is not one of 6 features"),
        ({"scatter": torch.zeros(6, 6, dtype=torch.int16)}, "is not one of 6 features"),
        ({"scatter": torch.zeros(21, dtype=torch.int16)}, "is not one of 6 features"),
        ({"exponent": 10**6}, "is not one of 6 features"),
        ({"exponent": "x" * 999}, "is not one of 6 features"),
        ({"classes": ["x", "x", "y"]}, "classes"),
        ({"base": "?"}, "base"),
    ],
)
def test_a_signature_whose_parts_do_not_go_together_is_refused(change, fault):
    signature = sign(features(3, 20, 0))
    tensors, facts = signature.tensors, signature.facts
    for name, value in change.items():
        (tensors if name in tensors else facts)[name] = value
    with pytest.raises(PatchError, match=rf"a signature is damaged .*{fault}.*'patch sign'"):
        Signature.from_parts(tensors, facts)


def test_features_that_are_not_finite_have_no_signature():
    train = features(3, 20, 0)
    train.features[3, 2] = torch.inf
    with pytest.raises(RunError, match="NaN or infinity for images of task 'task'"):
        sign(train)


# the router


def test_the_covariance_is_shrunk_as_scikit_learn_does():
    scatter = by_numpy(features(3, 5, 0))[2]
    free = 12
    values, vectors = np.linalg.eigh(scatter)
    rows = np.zeros((free, 6))  # images whose mean is 0, with this scatter
    rows[:6] = np.sqrt(values.clip(0))[:, None] * vectors.T
    wanted, shrinkage = oas(rows, assume_centered=True)
    precision, found = precision_matrix(torch.tensor(scatter), free)
    assert found == pytest.approx(shrinkage, rel=1e-9)
    assert 0 < found < 1
    np.testing.assert_allclose(precision, np.linalg.inv(wanted), rtol=1e-6)


def test_scores_are_those_of_a_linear_discriminant_over_all_classes():
    trains, signatures = stream()
    router = Router(signatures.values())
    sums = [by_numpy(train) for train in trains.values()]
    means, images = np.concatenate([mean for _, mean, _ in sums]), sum(count.sum() for count, *_ in sums)
    precision, _ = precision_matrix(torch.tensor(sum(scatter for *_, scatter in sums)), int(images - len(means)))
    x = torch.cat([train.features for train in trains.values()])

    class Given:
        def fit(self, _):
            self.covariance_ = np.linalg.inv(precision.numpy())
            return self

    labels, start = [], 0
    for train in trains.values():
        labels.append(train.labels + start)
        start += int(train.labels.max()) + 1
    lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Given(), priors=np.full(start, 1 / start))
    lda.fit(x.double().numpy(), torch.cat(labels).numpy())
    wanted = lda.predict_log_proba(x.double().numpy())
    found = router.scores(x).log_softmax(1).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-2)  # means are kept in half precision
    assert router.task_of.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_the_order_of_tasks_changes_no_bit_and_a_task_that_left_leaves_nothing():
    _, signatures = stream()
    a, b, c = signatures.values()
    x = features(4, 10, 7).features
    forwards, backwards = Router([a, b, c]), Router([c, b, a])
    order = [7, 8, 4, 5, 6, 0, 1, 2, 3]
    for name in ("_precision", "_centre"):
        assert torch.equal(getattr(forwards, name), getattr(backwards, name))
    for name in ("_means", "_bias"):
        assert torch.equal(getattr(forwards, name), getattr(backwards, name)[order])
    assert not torch.equal(Router([a, b]).scores(x), forwards.scores(x)[:, :5])
    first, second, third = (each.scatter.matrix for each in (a, b, c))
    pooled = first + second + third
    assert torch.equal(pooled - third, first + second)
    assert torch.equal((third + pooled) - pooled, third)


def test_the_temperature_is_the_one_of_the_least_cross_entropy():
    _, signatures = stream()
    router = Router(signatures.values())
    generator = torch.Generator().manual_seed(0)
    scores, tasks = 20 * torch.randn(500, 9, generator=generator), torch.randint(3, (500,), generator=generator)
    scores += 15 * (router.task_of == tasks[:, None])

    def loss(exponent):
        groups = scores.double().div(10**exponent).softmax(1).split([2, 3, 4], 1)
        probabilities = torch.stack([group.sum(1) for group in groups], 1)
        return -float(probabilities[torch.arange(500), tasks].log().mean())

    wanted = minimize_scalar(loss, bounds=(-1, 3), method="bounded").x
    assert np.log10(fit_temperature(lambda: [(scores, tasks)], router.task_of)) == pytest.approx(wanted, abs=0.02)
    found = task_probabilities(scores, router.task_of, 10**wanted)
    assert found.sum(1) == pytest.approx(1)


def test_tasks_that_are_equally_likely_share_the_probability_and_the_first_comes_first():
    for seed in range(4):
        train = features(2, 20, seed)
        router = Router([sign(train, name, 2) for name in "xyz"])
        routes = router.route(train.features[:5])
        np.testing.assert_allclose(routes.tasks, 1 / 3, rtol=1e-5)
        assert router.temperature == pytest.approx(1, rel=0.1)
    for each in find_candidates(router.tasks, Routes(torch.full((5, 3), 1 / 3), torch.ones(5)), 0):
        assert [task for task, _ in each.tasks] == ["x", "y"]
        assert each.asked == ["x", "y"]


def test_classes_of_one_image_or_none():
    one = part(features(3, 1, 0), slice(None))
    router = Router([sign(one, "one"), sign(part(one, slice(2)), "none")])  # no covariance: the nearest mean
    means = torch.stack([one.features[one.labels == label][0] for label in range(3)])
    x = features(3, 30, 1).features
    scores = router.scores(x)
    assert torch.equal(scores[:, :3].argmax(1), torch.cdist(x, means).argmin(1))
    assert torch.isinf(scores[:, 3:]).all(0).sum() == 1  # the class without images is never found
    assert router.shrinkage == 1
    assert router.route(x).tasks.isfinite().all()
    many = sign(features(3, 20, 0), "many")
    assert Router([many, sign(one, "one")]).shrinkage < 1
    assert Router([many]).route(x).tasks.flatten().tolist() == pytest.approx([1.0] * 90)


def test_signatures_of_other_bases_and_sizes_are_refused():
    train = features(3, 20, 0)
    with pytest.raises(PatchError, match=f"'second' belongs to base {OTHER[:12]}…, this base is {BASE[:12]}…; make it"):
        Router([sign(train, "first"), sign(train, "second", base=OTHER)])
    with pytest.raises(PatchError, match="'second' is of images of 48×48 pixels, not 32×32"):
        Router([sign(train, "first"), sign(train, "second", size=48)])
    with pytest.raises(RunError, match="task 'first' has two signatures"):
        Router([sign(train, "first"), sign(train, "first")])
    with pytest.raises(RunError, match="needs the signature of at least one task"):
        Router([])
    with pytest.raises(PatchError, match="NaN or infinity for an image"):
        Router([sign(train, "first")]).route(torch.full((1, 6), torch.nan))


def test_strange_images_are_refused_at_the_rate_that_is_asked_for():
    tasks = [(name, features(3, 300, seed, centre=20 * seed)) for seed, name in enumerate(("a", "b"))]
    router = Router(sign(part(x, slice(600)), name, val=part(x, slice(600, 750))) for name, x in tasks)
    known = torch.cat([x.features[750:] for _, x in tasks])
    familiar = router.route(known).familiar
    for rate in (0.05, 0.2):
        assert float((familiar < rate).double().mean()) == pytest.approx(rate, abs=0.04)
    far = router.route(known + 30 * torch.tensor([1.0, -1, 1, -1, 1, -1])).familiar
    assert float((far < 0.05).double().mean()) > 0.95
    assert (router.route(known).familiar > 0).all()  # none is refused at a rate of 0


def test_a_router_of_many_tasks_is_small_and_takes_time_by_its_classes():
    train = features(5, 4, 0, width=384)
    one = sign(train, "one", 5)

    def many(count):
        generator = torch.Generator().manual_seed(0)
        for index in range(count):
            means = one.means + torch.randn(5, 384, generator=generator)
            yield Signature(f"t{index}", one.classes, BASE, 32, one.counts, means, one.scatter, one.held_out)

    few, large, x = Router(many(100)), Router(many(1000)), torch.randn(64, 384)
    assert large.nbytes <= 1000 * 5 * 1000

    def seconds(router):
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            router.route(x)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(large) < 20 * seconds(few)
    assert large.route(large._means[::5].float() + large._centre.float()).tasks.argmax(1).tolist() == list(range(1000))


def test_a_small_signature_has_a_mean_and_a_count_for_each_class_and_is_found_all_the_same(tmp_path):
    sizes = []
    for classes in (5, 10):
        train = features(classes, 40, 3, width=384, spread=1.0)
        signature = sign(train, "new", classes)
        signature.small().save(tmp_path / "small")
        sizes.append((tmp_path / "small").stat().st_size)
    assert (sizes[1] - sizes[0]) / 5 <= 800
    small = Signature.load(tmp_path / "small")
    assert small.to_bytes() == signature.small().to_bytes()
    known = sign(features(5, 40, 4, width=384, spread=1.0), "known", 5)
    router, full = Router([known, small]), Router([known, signature])
    assert torch.equal(router._precision, Router([known])._precision)  # the scatter of the known task alone
    assert float((router.route(train.features).tasks.argmax(1) == 1).double().mean()) > 0.95
    same = router.scores(train.features).argmax(1) == full.scores(train.features).argmax(1)
    assert float(same.double().mean()) > 0.95
    for first, second in ((small, signature), (signature, small)):
        with pytest.raises(PatchError, match="a small signature of task 'new' cannot be merged"):
            first.merged(second)


# candidates


def test_the_answer_is_the_class_of_the_highest_product():
    routes = Routes(torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.1, 0.0], [0.3, 0.3, 0.4]]), torch.tensor([0.5, 0.5, 0.01]))
    first, second, third = find_candidates(["a", "b", "c"], routes, 0.05)
    assert (first.asked, second.asked, third.asked) == (["a", "b"], ["a"], [])
    a, b = (
        recast_pl.Prediction(task, label, p, {label: p, "rest": 1 - p})
        for task, label, p in (("a", "x", 0.5), ("b", "y", 0.9))
    )
    answer = first.answer([a, b])  # 0.25 against 0.36
    assert (answer.task, answer.label, answer.probability) == ("b", "y", 0.9)
    assert answer.task_probability == pytest.approx(0.4)
    assert (answer.second.task, answer.second.label, answer.second.probability) == ("a", "x", 0.5)
    answer = second.answer([a])
    assert (answer.task, answer.second.task, answer.second.label) == ("a", "b", None)
    answer = third.answer([])
    assert (answer.task, answer.label, answer.probability, answer.probabilities) == ("none", "", 0, {})
    assert answer.second == recast_pl.Choice("c", pytest.approx(0.4))


# commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tasks of real images, each trained for one epoch by a tiny network."""
    folder = tmp_path_factory.mktemp("routing") / "run"
    assert main(words(folder)) == 0
    return folder


def words(folder, *more, tasks=("food", "signs"), method="vit.yaml"):
    listed = [{"name": name, "path": str(CLIPART / name)} for name in tasks]
    return [
        *("fit", "--config", method, "--run_dir", str(folder), "--data.tasks", json.dumps(listed)),
        *("--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.weights", "random"),
        *("--model.backbone.args", json.dumps(TINY_VIT), "--data.image_size", "32"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        *more,
    ]


PICTURES = sorted((CLIPART / "signs").rglob("*.jpg"))[::8] + sorted((CLIPART / "people").rglob("*.jpg"))[::8]


def predicted(run, tmp_path, *more):
    output = tmp_path / "found.csv"
    images = ["--images", *map(str, PICTURES)]
    assert main(["predict", "--run_dir", str(run), "--task", "auto", "--output", str(output), *images, *more]) == 0
    return list(csv.DictReader(output.read_text().splitlines()))


def test_predict_finds_the_task_of_each_image(run, tmp_path):
    rows = predicted(run, tmp_path)
    assert list(rows[0]) == ["path", "task", "label", "probability", "task_probability"]
    assert [row["path"] for row in rows] == list(map(str, PICTURES))
    assert {row["task"] for row in rows} == {"food", "signs", "none"}
    model = recast_pl.load(run)
    for row, found in zip(rows, model.predict(PICTURES), strict=True):
        assert (row["task"], row["label"]) == (found.task, found.label)
        assert (row["probability"], row["task_probability"]) == (
            f"{found.probability:.6f}",
            f"{found.task_probability:.6f}",
        )
        if found.task == "none":
            assert (found.label, found.probability, found.familiar < 0.05) == ("", 0, True)
            continue
        (alone,) = model.predict(row["path"], found.task)
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert found.task_probability + found.second.task_probability == pytest.approx(1, abs=1e-5)
        score = found.task_probability * found.probability
        if found.second.label is None:
            assert found.second.task_probability < 0.18
        else:
            assert score >= found.second.task_probability * found.second.probability
    assert "none" not in {row["task"] for row in predicted(run, tmp_path, "--refuse", "0")}
    assert len(predicted(run, tmp_path, "--refuse", "0", "--top_k", "0")) > 4 * len(PICTURES)


def test_routing_uses_the_features_that_the_signatures_are_of(run):
    model = recast_pl.load(run)
    images = sorted((CLIPART / "food").rglob("*.jpg"))
    model.predict(PICTURES, "signs")  # the network holds another task now
    router = model.router
    held_out = Signature.load(run / "signatures" / "00_food.safetensors").held_out.features
    found = model._frozen_features(torch.stack([decode_any(path, 32) for path in images]))
    nearest = torch.cdist(held_out, found).amin(1)
    assert float(nearest.max()) < 1e-2 * float(found.std())
    assert router.tasks == ["food", "signs"]


def test_routing_takes_one_pass_and_the_second_candidate_a_part_of_one(run):
    model, passes = recast_pl.load(run), []
    network = model._network
    features = network.features
    network.features = lambda images, *others: passes.append(len(images)) or features(images, *others)
    found = model.predict(PICTURES, refuse=0)
    asked = sum(1 + (each.second.label is not None) for each in found)
    assert sum(passes) == len(PICTURES) + asked
    assert len(passes) == len(range(0, len(PICTURES), 64)) + len(range(0, asked, 64))


def test_an_image_that_json_describes(run, capsys):
    assert (
        main([*("predict", "--run_dir", str(run), "--task", "auto", "--format", "jsonl"), "--images", str(PICTURES[0])])
        == 0
    )
    row = json.loads(capsys.readouterr().out)
    assert list(row) == [
        *("path", "task", "label", "probability", "probabilities", "task_probability", "familiar", "second"),
    ]
    assert list(row["second"]) == ["task", "task_probability", "label", "probability"]


def test_signatures_of_an_old_run_are_made_again_bit_by_bit(run, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    shutil.rmtree(old / "signatures")
    predict = ["predict", "--run_dir", str(old), "--task", "auto", "--images", str(PICTURES[0])]
    assert main(predict) == 2
    assert f"task 'food' has no signature; make it with 'patch sign --run_dir {old}'" in capsys.readouterr().err
    assert recast_pl.load(old).predict(PICTURES[0], "food")
    assert main(["patch", "sign", "--run_dir", str(old)]) == 0
    assert "food, signs" in capsys.readouterr().out
    for path in (run / "signatures").iterdir():
        assert (old / "signatures" / path.name).read_bytes() == path.read_bytes()
    assert main(predict) == 0
    assert main(["patch", "sign", "--run_dir", str(old), "--output", str(tmp_path / "small")]) == 0
    assert "none, because every task has one" in capsys.readouterr().out
    model, names = recast_pl.load(old, tasks=["food"]), ("00_food", "01_signs")
    patch, small = (folder / "01_signs.safetensors" for folder in (old / "patches", tmp_path / "small"))
    assert [path.stem for path in sorted((tmp_path / "small").iterdir())] == list(names)
    whole = Signature.load(old / "signatures" / small.name)
    assert small.read_bytes() == whole.small().to_bytes()
    assert len(whole.to_bytes()) > 2 * small.stat().st_size
    model.add_patch(patch, small)
    assert {found.task for found in model.predict(PICTURES, refuse=0)} == {"food", "signs"}


def test_a_damaged_or_exchanged_signature_is_an_error(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    first, second = (copy / "signatures" / f"{name}.safetensors" for name in ("00_food", "01_signs"))
    predict = ["predict", "--run_dir", str(copy), "--task", "auto", "--images", str(PICTURES[0])]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert main(predict) == 2
    assert "the signature of task 'signs' with classes" in capsys.readouterr().err
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(predict) == 2
    assert "its checksum is wrong" in capsys.readouterr().err


def test_a_task_that_is_added_brings_its_signature(run, tmp_path):
    other = tmp_path / "other"
    assert main(words(other, tasks=["people"])) == 0
    model = recast_pl.load(run)
    before = model.predict(PICTURES)
    patch, signature = (other / folder / "00_people.safetensors" for folder in ("patches", "signatures"))
    model.add_patch(patch)
    with pytest.raises(RunError, match="task 'people' was added without its signature"):
        model.predict(PICTURES)
    model.remove("people")
    assert model.predict(PICTURES) == before
    model.add_patch(patch, signature)
    found = model.predict(PICTURES, refuse=0)
    assert {each.task for each in found} >= {"people"}
    model.remove("people")
    assert model.predict(PICTURES) == before
    with pytest.raises(PatchError, match="the signature of task 'food'"):
        model.add_patch(patch, run / "signatures" / "00_food.safetensors")
    assert model.tasks == ["food", "signs"]
    for refuse in (-0.1, 1):
        with pytest.raises(DataError, match=rf"refuse={refuse} must be at least 0 and below 1"):
            recast_pl.load(run).predict(PICTURES, refuse=refuse)


def test_tasks_that_share_weights_cannot_be_told_apart(tmp_path, capsys):
    folder = tmp_path / "shared"
    assert (
        main(words(folder, *("--model.pieces", json.dumps([{"class_path": "recast_pl.FineTune"}])), tasks=["food"]))
        == 0
    )
    assert not (folder / "signatures").exists()
    for command in (["predict", "--task", "auto", "--images", str(PICTURES[0])], ["patch", "sign"]):
        assert main([*command, "--run_dir", str(folder)]) == 2
        assert "tasks of ['FineTune'] share weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none", "auto", "None"])
def test_words_with_a_meaning_name_no_task(name, tmp_path, capsys):
    listed = [{"name": name, "path": str(CLIPART / "food")}]
    assert main([*words(tmp_path / "run"), "--data.tasks", json.dumps(listed)]) == 2
    assert f"task name '{name}' cannot name a file" in capsys.readouterr().err
