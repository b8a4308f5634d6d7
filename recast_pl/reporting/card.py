"""The card of a run: the README.md of its repository, with the facts that sites read at its top."""

from typing import Any, NamedTuple

import timm
from jinja2 import Environment, PackageLoader
from scipy import stats

from recast_pl.learning.patch import TaskPatch
from recast_pl.reporting.tables import markdown_table, plain
from recast_pl.rules import size_text
from recast_pl.runs.folder import Record, RunFolder
from recast_pl.runs.layout import plain_yaml

CARD = "README.md"
"""Name of the card."""

_HUB = ("hf-hub:", "hf_hub:")
"""What names of backbones begin with that timm takes from a repository."""


class _Task(NamedTuple):
    patch: TaskPatch
    record: Record
    bytes: int


def write_card(folder: RunFolder, repo: str, licence: str | None) -> str:
    """Writes the card of a run, as Markdown.

    Args:
        folder: The run, as it is in the repository.
        repo: OWNER/NAME of the repository.
        licence: Identifier of a licence, such as `apache-2.0`; None if none is stated.

    Returns:
        The card, with its facts as YAML at the top.
    """
    from huggingface_hub import ModelCardData  # noqa: PLC0415, takes a second

    tasks = [_Task(*files.load(), files.patch.stat().st_size) for files in folder.finished().values()]
    backbone: dict[str, Any] = plain_yaml(folder.config)["model"]["init_args"]["backbone"]
    patch, base_model = tasks[0].patch, find_base_model(backbone)
    facts = ModelCardData(
        license=licence,
        library_name="recast_pl",
        pipeline_tag="image-classification",
        tags=["recast_pl", "continual-learning", "task-incremental-learning", "parameter-efficient-fine-tuning"],
        base_model=base_model,
    )
    environment = Environment(loader=PackageLoader("recast_pl.reporting", ""), autoescape=False, trim_blocks=True)
    return environment.get_template("card.md").render(
        card_data=facts.to_yaml(),
        repo=repo,
        folder=repo.rpartition("/")[2],
        backbone=backbone["name"],
        weights=_weights(backbone, base_model),
        sizes=", ".join(dict.fromkeys(size_text(task.patch.image_size) for task in tasks)),
        method=" + ".join(patch.method),
        base=patch.base,
        table=_table(tasks),
        tasks=[{"name": plain(t.patch.task), "classes": ", ".join(map(plain, t.patch.classes))} for t in tasks],
        first=patch.task,
        licence="The authors have stated no licence." if licence is None else f"`{licence}`",
    )


def find_base_model(backbone: dict[str, Any]) -> str | None:
    """The repository on the Hugging Face Hub that a backbone is loaded from; None if it comes from elsewhere.

    Args:
        backbone: `name` and `weights`, as in a configuration.
    """
    name, weights = str(backbone["name"]), backbone.get("weights", "hub")
    if weights != "hub":
        return None
    if name.startswith(_HUB):
        return name.partition(":")[2]
    if not timm.is_model(name):
        return None
    config = timm.get_pretrained_cfg(name)
    found: str | None = config.hf_hub_id if config is not None else None
    return found


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's interval at 95 % of an accuracy in percent that was measured on some images."""
    right = round(accuracy * images / 100)
    found = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def _table(tasks: list[_Task]) -> str:
    header = ["task", "classes", "accuracy", "95 % interval", "test images", "bytes"]
    rows = []
    for _, record, size in tasks:
        task = record["task"]
        low, high = interval(task["accuracy"], task["test_images"])
        counts = [str(task["classes"]), f"{task['accuracy']:.1f}", f"{low:.1f}–{high:.1f}", f"{task['test_images']:,}"]
        rows.append([plain(task["name"]), *counts, f"{size:,}"])
    return markdown_table((header, rows))


def _weights(backbone: dict[str, Any], base_model: str | None) -> str:
    weights = backbone.get("weights", "hub")
    if base_model is not None:
        return f"[{base_model}](https://huggingface.co/{base_model})"
    if weights == "hub":
        return "those that the backbone is published with"
    if weights == "random":
        return "none: random numbers from the seed of the run"
    return f"the file `{weights}`, which belongs into the folder"
