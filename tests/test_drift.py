"""Whether the server notices that the images of a task have changed."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy.stats import ks_2samp, kstwobign
from test_predictor import run  # noqa: F401
from test_serve import TOKEN, ask, metrics, model, predictor, serve  # noqa: F401

from recast_pl import SequentialTaskDataModule, Signature, TaskConfig
from recast_pl.inference.prediction import Prediction
from recast_pl.inference.server.drift import FEWEST, DriftMonitor
from recast_pl.learning.histogram import BINS, certainty, distance, distance_limit, histogram


def held_out(name):
    """The files of the validation and test images of a clip-art task."""
    data = SequentialTaskDataModule([TaskConfig(name, str(ROOT / "data" / "clipart" / name))], image_size=32)
    data.check()
    images = data._images
    return [images.source.images.paths[i] for split in ("val", "test") for i in images.splits[split].tolist()]


def file_of(path, change=lambda image: image):
    content = io.BytesIO()
    change(Image.open(path).convert("RGB")).save(content, "PNG")
    return content.getvalue()


def test_the_distance_is_that_of_scipy_on_values_in_bins():
    generator = np.random.default_rng(0)
    one, other = generator.beta(2, 3, 300), generator.beta(2, 2, 80)
    counts = [histogram(torch.tensor(values)) for values in (one, other)]
    binned = [np.repeat(np.arange(BINS), each) for each in counts]
    assert [sum(each) for each in counts] == [300, 80]
    assert distance(*counts) == pytest.approx(ks_2samp(*binned).statistic, abs=1e-12)
    assert distance(*counts) <= ks_2samp(one, other).statistic
    assert distance_limit(300, 80) == pytest.approx(kstwobign.isf(1e-3) * (380 / 24000) ** 0.5, rel=1e-3)


def test_like_images_seldom_exceed_the_limit():
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(1000):
        one, other = (torch.rand(n, generator=generator) for n in (43, 100))
        alarms += distance(histogram(one), histogram(other)) > distance_limit(43, 100)
    assert alarms <= 5


def test_certainty_tells_high_probabilities_apart():
    found = certainty(torch.tensor([0.0, 0.5, 0.99, 0.999, 1.0]))
    torch.testing.assert_close(
        found, torch.tensor([0, 0.0693, 0.4605, 0.6908, 1], dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_a_signature_keeps_how_sure_the_task_is_of_its_validation_images(run, model):  # noqa: F811
    data = SequentialTaskDataModule(
        [TaskConfig("signs", str(ROOT / "data" / "clipart" / "signs"))], image_size=32, cache="off"
    )
    data.check()
    paths = [data._images.source.images.paths[i] for i in data._images.splits["val"].tolist()]
    wanted = np.zeros(BINS, int)
    for found in model.predict(paths, "signs"):
        wanted[min(BINS - 1, int(-np.log1p(-found.probability) / 10 * BINS))] += 1
    kept = np.array(model.signature("signs").confidence)
    assert kept.sum() == len(paths)
    assert np.abs(np.cumsum(kept - wanted)).max() <= 1  # a value on the edge of a bin may round to either side


def test_shifted_images_are_noticed_and_known_ones_are_not(serve):  # noqa: F811
    paths = held_out("signs")
    client = serve()
    for path in paths:
        assert ask(client, file_of(path), "signs", "image.png").status_code == 200
    (known,) = client.get("/drift").json()
    assert (known["task"], known["measure"], known["images"]) == ("signs", "confidence", len(paths))
    assert known["distance"] < known["limit"]
    assert not known["drifted"]
    client = serve()
    for path in paths:
        found = client.post("/predict", files={"image": ("a.png", file_of(path, lambda i: i.point(lambda v: v // 8)))})
        assert found.status_code == 200
    rows = client.get("/drift").json()
    assert any(row["drifted"] for row in rows if row["measure"] == "familiar")
    values = metrics(client)
    for row in rows:
        assert values["recast_pl_drift_distance", row["measure"], row["task"]] == row["distance"]
        assert values["recast_pl_drift_limit", row["measure"], row["task"]] == row["limit"]
    drifted = {row["task"] for row in rows if row["drifted"]}
    assert {key[1] for key, value in values.items() if key[0] == "recast_pl_drifted" and value == 1} == drifted


def test_memory_is_bounded_and_old_images_count_less(model):  # noqa: F811
    monitor = DriftMonitor(model)
    sure, unsure = (Prediction("signs", "flags", p, {}) for p in (0.9999, 0.3))
    for _ in range(FEWEST - 1):
        monitor.observe(sure)
    assert monitor.measure() == []
    for _ in range(5000):
        monitor.observe(sure)
    (drift,) = monitor.measure()
    assert 500 <= drift.images <= 1000
    for _ in range(3000):
        monitor.observe(unsure)
    counts = monitor._tasks["signs"].counts["confidence"]
    assert len(counts) == BINS
    assert max(counts) / sum(counts) > 0.9


def test_a_task_without_a_signature_of_its_own_is_not_watched(model, monkeypatch):  # noqa: F811
    signature = dataclasses.replace(model.signature("signs"), confidence=())
    monkeypatch.setattr(model, "signature", lambda name: signature)
    monitor = DriftMonitor(model)
    for _ in range(FEWEST):
        monitor.observe(Prediction("signs", "flags", 0.5, {}))
    assert monitor.measure() == []


def test_a_signature_with_a_damaged_histogram_is_refused(model):  # noqa: F811
    signature = model.signature("signs")
    for wrong in ([1] * (BINS - 1), [-1] * BINS, [0.5] * BINS):
        with pytest.raises(Exception, match="confidence is not 20 numbers"):
            Signature.from_parts(signature.tensors, signature.facts | {"confidence": wrong})
