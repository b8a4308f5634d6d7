"""Fits templates by gradient into a run folder."""

from lightning import seed_everything

from recast_pl.compat.lightning import lightning_errors
from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.files import json_text, write_atomic
from recast_pl.learning.trainer import Resources, TrainerFactory
from recast_pl.runs.folder import RunFolder


def fit_mimicry(
    module: MimicryModule, folder: RunFolder, trainers: TrainerFactory, seed: int = 42, config: str | None = None
) -> tuple[Decomposition, dict[str, float]]:
    """Fits templates by gradient, and writes the decomposition and `mimicry.json` with the time and memory it took.

    Args:
        module: What to fit.
        folder: The run folder.
        trainers: Makes the trainer. Nothing is written after a `fast_dev_run`.
        seed: Seed of the initial values and of the noise.
        config: Content of `config.yaml`; None to write none.

    Returns:
        The decomposition, and the cosine of each generated weight with the pretrained one, by name.
    """
    seed_everything(seed, verbose=False)
    module.configure_model()
    if config is not None and trainers.keeps:
        folder.record_start()

        write_atomic(folder.config, config)
    resources = Resources()
    trainer = trainers.without_checkpoints().for_training(folder.path, "mimicry", [resources])
    with lightning_errors():
        trainer.fit(module)
    decomposition, cosines = module.decomposition(), module.weight_cosines()
    if trainer.is_global_zero and trainers.keeps:
        facts = {
            "backbone": module.backbone.name,
            "weights": sum(weight.numel() for weight in decomposition.reconstruct().values()),
            "weight_cosine": sum(cosines.values()) / len(cosines),
            "epochs": trainer.current_epoch,
            **resources.used(),
        }
        decomposition.save(folder.decomposition)
        write_atomic(folder.mimicry, json_text(facts))
    return decomposition, cosines
