"""The command `analyze` on files and runs, compared with numpy and scipy in float64."""

import json
import math
import shutil
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TINY_VIT
from lightning import seed_everything
from PIL import Image
from scipy.spatial.distance import cosine
from torch import nn

from recast_pl import (
    BackboneConfig,
    BankLayout,
    Decomposition,
    SequentialTaskDataModule,
    TaskConfig,
    TaskPatch,
    decompose,
    install,
)
from recast_pl.cli import main
from recast_pl.decomposition.analysis import Analysis, analyze, displacements
from recast_pl.decomposition.bank import Bank, Scaling
from recast_pl.decomposition.similarity import TargetSimilarity, feature_similarity, weight_similarity
from recast_pl.decomposition.targets import Group
from recast_pl.errors import DecompositionError
from recast_pl.reporting.analysis_plots import plot_coefficient_similarity, plot_displacements, plot_template_diversity

SMALL = TINY_VIT | {"depth": 4}
VIT = BackboneConfig("vit_tiny_patch16_224", "random", SMALL)
LOSSY = {"targets": [r"mlp\.fc[12]\.weight"], "groups": 1, "templates": 2, "coefficient_sets": 2}
TARGETS = [f"blocks.{i}.mlp.fc{j}.weight" for i in range(4) for j in (1, 2)]


def bank(name, n, layers, shape, sets=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = tuple(f"{name}.{i}.weight" for i in range(layers))
    templates = torch.randn(n, *shape, generator=generator)
    return Bank(
        Group(f"{name}.*.weight:0", targets, shape, n), templates, torch.randn(layers, sets, n, generator=generator)
    )


def analysis_of(decomposition, folder, *words):
    decomposition.save(folder / "decomposition.safetensors")
    assert main(["analyze", "--decomposition", str(folder / "decomposition.safetensors"), *map(str, words)]) == 0
    return json.loads((folder / "analysis" / "analysis.json").read_text())


@pytest.fixture
def _no_pictures(monkeypatch):
    """Skips the pictures, which take most of the time and are not tested here."""
    monkeypatch.setattr("recast_pl.cli.analyze.write_figure", lambda figure, path: None)


def flat(tensor):
    return tensor.detach().double().numpy().ravel()


# files


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 2, 2), (9, 2)], ids=str)
def test_numbers_of_templates_and_coefficients_match_numpy(shape, tmp_path):
    one = bank("conv", 3, 4, shape, sets=2)
    (found,) = analysis_of(Decomposition((one,)), tmp_path)["groups"]
    pairs = [np.linalg.norm(flat(a) - flat(b)) for a, b in combinations(one.templates, 2)]
    assert found["frobenius_mean"] == pytest.approx(np.mean(pairs), rel=1e-9)
    assert found["frobenius"] == pytest.approx(sum(pairs) / (3 * 2), rel=1e-9)  # as printed: 1/(n(n−1)) Σ_{i<j}
    matrices = [t.double().numpy().reshape(shape[0], -1) for t in one.templates]
    entropies = [scipy.stats.entropy(np.linalg.svd(m, compute_uv=False)) for m in matrices]
    assert found["entropy"] == pytest.approx(np.mean(entropies), rel=1e-7)
    assert found["entropy_limit"] == pytest.approx(math.log(min(matrices[0].shape)))
    similarities = [[1 - cosine(flat(a), flat(b)) for b in one.coefficients] for a in one.coefficients]
    assert np.array(found["similarity"]) == pytest.approx(np.array(similarities), abs=1e-9)
    upper = np.array(similarities)[np.triu_indices(4, 1)]
    assert found["similarity_mean"] == pytest.approx(upper.mean(), rel=1e-6)


def test_entropy_is_largest_for_a_rotation_and_zero_for_rank_one(tmp_path):
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    single = torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
    for template, wanted in ((rotation, math.log(8)), (single, 0.0)):
        group = Group("a.*.weight:0", ("a.0.weight",), (8, 8), 1)
        (found,) = analyze(Decomposition((Bank(group, template[None], torch.ones(1, 1, 1)),))).groups
        assert found.entropy == pytest.approx(wanted, abs=1e-4)


@pytest.mark.usefixtures("_no_pictures")
def test_a_single_template_and_a_single_layer_have_no_pairs(tmp_path, capsys):
    (found,) = analysis_of(Decomposition((bank("a", 1, 1, (4, 4)),)), tmp_path)["groups"]
    assert [found[key] for key in ("frobenius", "frobenius_mean", "similarity_mean")] == [None] * 3
    assert found["entropy"] is not None
    output = " ".join(capsys.readouterr().out.split())
    assert "–: one template, or one layer, has no pairs" in output
    assert output.count("–") >= 4  # three cells and the note below the table


@pytest.mark.usefixtures("_no_pictures")
def test_the_savings_match_a_count_by_hand(tmp_path, capsys):
    # two kinds of 6 layers, 8×4, in groups of 3, with 2 templates and 2 sets of coefficients
    model = nn.ModuleDict({"a": nn.ModuleList(nn.Linear(4, 8) for _ in range(6))})
    model["b"] = nn.ModuleList(nn.Linear(8, 4) for _ in range(6))
    found = analysis_of(decompose(model, BankLayout(["weight"], groups=2, templates=2, coefficient_sets=2)), tmp_path)
    each = {"dense": 3 * 32, "templates": 2 * 32, "coefficients": 3 * 2 * 2, "kept": 3 * 2, "approximation": 32}
    assert [group["scaling"] for group in found["groups"]] == [each | {"saved": 96 - 64 - 12}] * 4
    assert found["scaling"] == {key: 4 * value for key, value in (each | {"saved": 20}).items()}
    symbols = {"d2": 32, "modules": 2, "layers": 6, "groups": 2, "templates": 2, "coefficient_sets": 2}
    assert found["paper"] == symbols | {"approximation": 32 * 2 * (6 - 2 * 2)}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["total", "384", "256", "48", "24", "80", "128"] in rows


@pytest.mark.usefixtures("_no_pictures")
def test_the_papers_formula_is_left_out_if_groups_differ(tmp_path):
    found = analysis_of(Decomposition((bank("a", 2, 3, (4, 4)), bank("b", 2, 3, (4, 5)))), tmp_path)
    assert found["paper"] is None
    assert found["scaling"]["approximation"] == 16 * (3 - 2) + 20 * (3 - 2)


def test_all_output_files_are_readable_and_the_same_every_time(tmp_path, capsys):
    decomposition, folder = Decomposition((bank("a", 2, 3, (4, 4)), bank("b", 1, 8, (4, 5)))), tmp_path / "o"
    decomposition.save(tmp_path / "d.safetensors")
    words = ["analyze", "--decomposition", str(tmp_path / "d.safetensors"), "--output", str(folder)]
    assert main(words) == 0
    names = {path.name for path in folder.iterdir()}
    pictures = {"template_diversity", "coefficient_similarity"}
    assert names == {"analysis.json", "analysis.md"} | {f"{p}.{s}" for p in pictures for s in ("png", "svg")}
    for picture in pictures:
        with Image.open(folder / f"{picture}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
        assert ElementTree.parse(folder / f"{picture}.svg").getroot().tag.endswith("svg")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    cells = [line.split("|")[1].strip() for line in (folder / "analysis.md").read_text().splitlines() if "|" in line]
    assert cells == ["group", "---", "a:0", "b:0", "group", "---", "a:0", "b:0", "total"]


def maps(figure):
    return [axes.images[0].get_array().tolist() for axes in figure.axes if axes.images and axes.get_xlabel() == ""]


def test_pictures_show_the_numbers():
    model = nn.ModuleDict({"a": nn.ModuleList(nn.Linear(4, 8) for _ in range(6))})
    model["b"] = nn.ModuleList(nn.Linear(8, 4) for _ in range(6))
    groups = analyze(decompose(model, BankLayout(["weight"], groups=2))).groups
    frobenius, entropy = plot_template_diversity(groups).axes
    for axes, key in ((frobenius, "frobenius"), (entropy, "entropy")):
        values = [getattr(group, key) for group in groups]
        assert [line.get_ydata().tolist() for line in axes.lines] == [values[:2], values[2:]]  # a line for each kind
        styles = {(line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(styles) == 2  # distinguishable without colour
        assert axes.get_xlabel()
        assert "(" in axes.get_ylabel()
    shown = maps(plot_coefficient_similarity(groups))
    assert shown[:4] == [list(map(list, group.similarity)) for group in groups]
    assert maps(plot_displacements({"t": {"a": 1.0, "b": 3.0}}))[0] == [[1.0, 3.0]]


def test_kinds_with_one_group_each_share_a_row():
    groups = analyze(Decomposition(tuple(bank(f"k{i}", 2, 3, (4, 4), seed=i) for i in range(6)))).groups
    (line,) = plot_template_diversity(groups).axes[0].lines
    assert line.get_ydata().tolist() == [group.frobenius for group in groups]
    figure = plot_coefficient_similarity(groups)
    assert maps(figure)[:6] == [list(map(list, group.similarity)) for group in groups]
    assert [axes.get_title() for axes in figure.axes[:6]] == [f"k{i}.*.weight" for i in range(6)]


# files and runs with their network


@pytest.fixture
def images(image_folder):
    return image_folder("pictures", classes=2, images=3)


def dense_network(seed=42):
    seed_everything(seed, verbose=False)
    return VIT.build(32)


def features_by_hooks(backbone, batch):
    """Returns the outputs of layers, blocks and network, recorded by the test's own hooks."""
    names = [f"blocks.{i}" for i in range(4)] + [name.removesuffix(".weight") for name in TARGETS]
    kept = {}
    for name in names:
        backbone.net.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: kept.update({name: y}))
    with torch.no_grad():
        kept["features"] = backbone(batch)
    return kept


def check_features(found, decomposition, batch):
    dense, decomposed = dense_network(), dense_network()
    install(decomposed.net, decomposition)
    ours, theirs = features_by_hooks(decomposed, batch), features_by_hooks(dense, batch)
    assert {entry["name"] for entry in found} == set(theirs)
    for entry in found:
        rows = zip(ours[entry["name"]], theirs[entry["name"]], strict=True)
        wanted = [1 - cosine(flat(a), flat(b)) for a, b in rows]
        assert entry["mean"] == pytest.approx(np.mean(wanted), abs=1e-5)
        assert entry["lowest"] == pytest.approx(min(wanted), abs=1e-5)
    kinds = [entry["kind"] for entry in found]
    assert (kinds.count("layer"), kinds.count("block"), kinds[-1]) == (8, 4, "features")
    assert min(entry["lowest"] for entry in found) < 0.99  # the decomposition is lossy


def check_targets(found, decomposition, network):
    assert [entry["name"] for entry in found] == list(decomposition.reconstruct())
    for entry in found:
        ours, theirs = flat(decomposition.reconstruct()[entry["name"]]), flat(network.get_parameter(entry["name"]))
        assert entry["cosine"] == pytest.approx(1 - cosine(ours, theirs), abs=1e-9)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert entry["relative_error"] == pytest.approx(error, rel=1e-6)
        assert 0.1 < error < 1


def batch_of(paths):
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def test_a_run_of_tasks_is_compared_with_its_backbone_on_test_images(tiny_fit, tmp_path, images, capsys):
    pieces = [{"class_path": "Recast", "init_args": {"layout": LOSSY, "learning_rate": 0.5}}]
    words = tiny_fit(
        *("--model.pieces", json.dumps(pieces), "--model.backbone.args", json.dumps(SMALL)),
        *("--trainer.max_epochs", "1", "--model.head", "sgd"),
    )
    run_dir = tmp_path / "run"
    assert main(words) == 0
    assert main(["analyze", "--run_dir", str(run_dir)]) == 0
    decomposition = Decomposition.load(run_dir / "decomposition.safetensors")
    found = json.loads((run_dir / "analysis" / "analysis.json").read_text())
    check_targets(found["targets"], decomposition, dense_network().net)
    data = SequentialTaskDataModule((TaskConfig("first", str(tmp_path / "first")),), image_size=32, seed=42)
    data.prepare_data()
    raw = [data.on_after_batch_transfer(batch, 0)[0] for batch in data.plain_dataloader("test")]
    check_features(found["features"], decomposition, torch.cat(raw))

    assert list(found["displacements"]) == ["first", "second"]
    (path,) = (run_dir / "patches").glob("*_second.safetensors")
    trained = iter(flat(TaskPatch.load(path).pieces[0]["coefficients"]).reshape(-1, 2))
    for part in decomposition.banks:
        for name, sets in zip(part.group.targets, part.coefficients, strict=True):
            moved = np.linalg.norm(next(trained) - sets.double().numpy().mean(0))
            assert found["displacements"]["second"][name] == pytest.approx(moved, rel=1e-5)
            assert moved > 0
    pictures = {path.name for path in (run_dir / "analysis").glob("*.png")}
    assert {"feature_similarity.png", "coefficient_displacement.png"} <= pictures

    assert main(["analyze", "--run_dir", str(run_dir), "--images", str(images), "--output", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "analysis.json").read_text())
    check_features(found["features"], decomposition, batch_of(sorted(images.rglob("*.png"))))

    shutil.rmtree(tmp_path / "first")
    capsys.readouterr()
    assert main(["analyze", "--run_dir", str(run_dir)]) == 0
    output = capsys.readouterr()
    assert "features are not compared, because there are no images" in output.out
    assert json.loads((run_dir / "analysis" / "analysis.json").read_text())["features"] == []

    (run_dir / "decomposition.safetensors").unlink()
    assert main(["analyze", "--run_dir", str(run_dir)]) == 2
    assert "holds no decomposition" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_pictures")
def test_a_gradient_fit_is_compared_with_its_teacher(tmp_path, images):
    small = {"name": VIT.name, "weights": "random", "args": SMALL}
    words = ["fit", "--config", "mimicry_vit.yaml", "--run_dir", str(tmp_path / "run")]
    words += ["--model.backbone", json.dumps(small), "--model.image_size", "32", "--model.layout.groups", "2"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    assert main([*words, *quiet]) == 0
    one = sorted(images.rglob("*.png"))[0]
    assert main(["analyze", "--run_dir", str(tmp_path / "run"), "--images", str(one)]) == 0
    found = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
    decomposition = Decomposition.load(tmp_path / "run" / "decomposition.safetensors")
    network = dense_network().net
    for entry in found["targets"]:
        ours, theirs = flat(decomposition.reconstruct()[entry["name"]]), flat(network.get_parameter(entry["name"]))
        assert entry["cosine"] == pytest.approx(1 - cosine(ours, theirs), abs=1e-9)
    check_features(found["features"], decomposition, batch_of([one]))
    assert found["weight_cosine"] == pytest.approx(np.mean([entry["cosine"] for entry in found["targets"]]))
    blocks = [entry["mean"] for entry in found["features"] if entry["name"] in {f"blocks.{i}" for i in range(4)}]
    assert found["feature_similarity"] == pytest.approx(np.mean(blocks))  # as in the authors' release
    assert found["displacements"] == {}
    table = (tmp_path / "run" / "analysis" / "analysis.md").read_text()
    assert f"weight cosine {found['weight_cosine']:.6f}" in table
    assert f"feature similarity {found['feature_similarity']:.6f}" in table


@pytest.mark.usefixtures("_no_pictures")
def test_an_exact_decomposition_keeps_the_features_of_its_backbone(tmp_path, images):
    torch.save(dense_network().net.state_dict(), tmp_path / "vit.pth")
    decomposition = decompose(dense_network().net, BankLayout([r"mlp\.fc[12]\.weight"], groups=2))
    backbone = {"name": VIT.name, "weights": str(tmp_path / "vit.pth"), "args": SMALL}
    network = ["--backbone", json.dumps(backbone), "--image_size", "32"]
    found = analysis_of(decomposition, tmp_path, *network, "--images", *sorted(images.rglob("*.png")))
    assert [found["weight_cosine"], found["feature_similarity"]] == pytest.approx([1, 1])
    assert max(entry["relative_error"] for entry in found["targets"]) < 1e-6
    assert min(entry["lowest"] for entry in found["features"]) > 1 - 1e-9
    alone = analysis_of(decomposition, tmp_path, *network)  # without images, there is nothing to compare
    assert (alone["features"], alone["feature_similarity"]) == ([], None)


def test_the_output_projection_is_compared_at_the_output_of_attention():
    backbone = BackboneConfig("torchvision/vit_b_16", "random", {"image_size": 32}).build(32)
    decomposition = decompose(backbone.net, BankLayout([r"self_attention\.out_proj\.weight"]))
    found = feature_similarity(decomposition, backbone, [torch.rand(2, 3, 32, 32)])
    layers = [feature.name for feature in found if feature.kind == "layer"]
    assert layers == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(12)]
    assert all(feature.lowest == pytest.approx(1) for feature in found)


def test_a_network_in_half_precision_can_be_compared():
    network = dense_network().net
    decomposition = decompose(network, BankLayout([r"mlp\.fc[12]\.weight"], groups=2))
    found = weight_similarity(decomposition, network.bfloat16())
    assert all(1e-4 < target.relative_error < 1e-2 for target in found)  # the rounding to bfloat16


def test_infinity_is_written_as_null():
    scaling = Scaling.of([])
    content = Analysis((), scaling, None, (TargetSimilarity("zero", 0.0, math.inf),)).content()
    assert content["targets"] == [{"name": "zero", "cosine": 0.0, "relative_error": None}]
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("count", [5, 7])
def test_coefficients_of_another_decomposition_are_refused(count):
    decomposition = Decomposition((bank("a", 2, 3, (4, 4)),))
    assert list(displacements(decomposition, torch.zeros(6))) == ["a.0.weight", "a.1.weight", "a.2.weight"]
    with pytest.raises(DecompositionError, match=rf"shape \({count},\), the decomposition has 6"):
        displacements(decomposition, torch.zeros(count))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["--run_dir", "--decomposition"]),
        (["--decomposition", "FILE", "--run_dir", "x"], ["--decomposition", "leave out one of them"]),
        (["--image_size", "32", "--run_dir", "x"], ["--image_size", "leave out one of them"]),
        (["--image_size", "32", "--decomposition", "FILE"], ["--image_size", "give --backbone"]),
        (["--run_dir", "/no/such/run"], ["/no/such/run", "does not exist"]),
        (["--decomposition", "/no/such/file"], ["/no/such/file", "check the path"]),
        (["--decomposition", "FILE", "--images", "IMAGE"], ["--images", "--backbone"]),
        (["--decomposition", "FILE", "--images", "EMPTY"], ["empty", "no image"]),
        (["--decomposition", "FILE", "--backbone.name", "resnet18", "--backbone.weights", "random"], ["a.0.weight"]),
    ],
    ids=["nothing", "both", "size of a run", "size alone", "run", "file", "no backbone", "empty", "other backbone"],
)
def test_user_errors_are_one_line(words, named, tmp_path, images, capsys):
    (tmp_path / "empty").mkdir()
    Decomposition((bank("a", 2, 3, (4, 4)),)).save(tmp_path / "d.safetensors")
    real = {"FILE": tmp_path / "d.safetensors", "IMAGE": images / "class0" / "000.png", "EMPTY": tmp_path / "empty"}
    assert main(["analyze", *(str(real.get(word, word)) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in named)
