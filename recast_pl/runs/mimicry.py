"""Fits templates by gradient into a run folder."""

from pathlib import Path

from lightning import seed_everything

from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.files import json_text, write_atomic
from recast_pl.learning.trainer import Resources, TrainerFactory


def fit_mimicry(
    module: MimicryModule, run_dir: Path, trainers: TrainerFactory, seed: int = 42, config: str | None = None
) -> tuple[Decomposition, dict[str, float]]:
    """Fits templates by gradient; writes `decomposition.safetensors` and, of how it went, `mimicry.json`.

    Args:
        module: What to fit.
        run_dir: The run folder; TensorBoard's events go there too.
        trainers: Makes the trainer.
        seed: Seed of the start and the noise.
        config: Content of `config.yaml`; None for none.

    Returns:
        The fit, and the cosine of each generated weight with the pretrained one, by name.
    """
    seed_everything(seed, verbose=False)
    module.configure_model()
    if config is not None:
        write_atomic(run_dir / "config.yaml", config)
    resources = Resources()
    trainer = trainers.without_checkpoints().for_training(run_dir, "mimicry", [resources])
    trainer.fit(module)
    decomposition, similarities = module.decomposition(), module.similarities()
    if trainer.is_global_zero:
        facts = {
            "backbone": module.backbone.name,
            "weights": sum(weight.numel() for weight in decomposition.reconstruct().values()),
            "similarity": sum(similarities.values()) / len(similarities),
            "epochs": trainer.current_epoch,
            **resources.used(),
        }
        decomposition.save(run_dir / "decomposition.safetensors")
        write_atomic(run_dir / "mimicry.json", json_text(facts))
    return decomposition, similarities
