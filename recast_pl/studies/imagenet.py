"""Compares a pretrained classifier with itself after decomposition, on images (table 6 of the paper)."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from recast_pl.backbones.builders import Classifier
from recast_pl.data.images import images_below, open_image
from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.parametrization import install
from recast_pl.decomposition.similarity import (
    compared_modules,
    cosines,
    mean_cosine,
    recorded,
    reported,
    weight_similarity,
)
from recast_pl.errors import DataError
from recast_pl.learning.device import find_device


class ImageNetFolder(Dataset[tuple[Tensor, int]]):
    """Images of a folder CLASS/…/IMAGE or val/CLASS/…/IMAGE; labels number the classes by name.

    Args:
        root: The folder.
        preprocess: Turns an RGB image into a tensor (3, S, S).

    Raises:
        DataError: If the folder holds no images.
    """

    def __init__(self, root: Path, preprocess: Callable[[Image.Image], Tensor]) -> None:
        root = root / "val" if (root / "val").is_dir() else root
        self.preprocess = preprocess
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        named = enumerate(self.classes)
        self.paths = [(path, label) for label, name in named for path in images_below(root / name)]
        if not self.paths:
            raise DataError(f"{root} holds no images in class folders; give a folder of CLASS/IMAGE")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.paths[index]
        return self.preprocess(open_image(path)), label


def compare_classifiers(
    classifier: Classifier,
    decomposition: Decomposition,
    root: Path,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Classifies images with a network and with its decomposed copy.

    Args:
        classifier: The network; it is not changed.
        decomposition: Decomposition of some of its weights.
        root: Folder of images. If it has as many classes as the network has outputs, they count as the same classes.
        batch_size: Images in a batch.
        num_workers: Processes that decode images; 0 decodes in this process.
        device: Where to compute; None for what the machine has.

    Returns:
        `images`: count of images; `dense_accuracy` and `decomposed_accuracy` in percent, None for other classes than
        the network's; `agreement`: percentage of equal predictions, None for a network without a classifier;
        `weight_cosine`: cosine of a generated with the pretrained weight, averaged over weights; `feature_similarity`:
        cosine of the output of a block in both networks, averaged over images and blocks.

    Raises:
        DataError: If the folder holds no images, or one cannot be read.
        DecompositionError: If the decomposition belongs to another network.
    """
    data = ImageNetFolder(root, classifier.preprocess)
    device = device or find_device()
    dense, decomposed = classifier.net.to(device), copy.deepcopy(classifier.net)
    install(decomposed, decomposition)
    decomposed.to(device)
    weight_cosine = mean_cosine(weight_similarity(decomposition, dense))
    blocks = reported(compared_modules(dense, decomposition))
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in DataLoader(data, batch_size, num_workers=num_workers):
        batch, classes = _compare_batch(dense, decomposed, blocks, images.to(device), labels.to(device))
        sums += batch.cpu()
    dense_right, decomposed_right, equal, similarity = sums.tolist()
    classifies = getattr(classifier.net, "num_classes", None) != 0  # timm's sign of a network that returns features
    labelled = classifies and len(data.classes) == classes
    return {
        "images": len(data),
        "dense_accuracy": 100 * dense_right / len(data) if labelled else None,
        "decomposed_accuracy": 100 * decomposed_right / len(data) if labelled else None,
        "agreement": 100 * equal / len(data) if classifies else None,
        "weight_cosine": weight_cosine,
        "feature_similarity": similarity / len(data),
    }


@torch.inference_mode()
def _compare_batch(
    dense: nn.Module, decomposed: nn.Module, blocks: Sequence[str], images: Tensor, labels: Tensor
) -> tuple[Tensor, int]:
    """Counts correct predictions of each network and equal ones, sums similarities (4,), and counts the classes."""
    with recorded(dense, blocks) as theirs, recorded(decomposed, blocks) as ours:
        expected, logits = dense(images), decomposed(images)  # (B, classes)
    first, second = expected.argmax(1), logits.argmax(1)
    similar = torch.stack([cosines(theirs[block], ours[block]) for block in theirs]).mean(0)  # (B,)
    facts = (first == labels, second == labels, first == second, similar)
    return torch.stack([fact.float().sum() for fact in facts]), expected.shape[1]
