"""The buffer of images from earlier tasks, and the base of methods that replay them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.guard import Guard
from recast_pl.methods.piece import Step


class Samples(NamedTuple):
    """Images in a buffer, or on their way there.

    Args:
        images: uint8 (N, 3, S, S).
        labels: Class indices (N,), each within its own task.
        tasks: Positions of their tasks (N,).
        logits: Output of each image's own head when it was inserted (N, C); minus infinity beyond the head's classes.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    logits: Tensor

    def take(self, which: Tensor) -> "Samples":
        """The samples at some positions."""
        return Samples(*(part[which] for part in self))

    def to(self, device: torch.device) -> "Samples":
        """The same samples on a device."""
        return Samples(*(part.to(device) for part in self))


_NO_SAMPLES = Samples(*(torch.empty(0, 0) for _ in Samples._fields))


class Buffer:
    """A bounded buffer of images on the CPU, of 3·S² bytes each.

    Processes that add the same images in the same order keep the same ones.

    Args:
        balanced: Whether to keep classes equally frequent: an image of the most frequent class leaves for one of a
            rarer class, and each class keeps its images with equal probability (Chrysakis and Moens, "Online Continual
            Learning from Imbalanced Data", ICML 2020). Otherwise every image ever added is kept with equal probability
            by reservoir sampling (Vitter, "Random Sampling with a Reservoir", TOMS 1985).
        per_class: Images for each class seen so far; None to bound them in total.
        total: Images in total; None to bound them by class.

    Raises:
        MethodError: Unless exactly one bound is given, and it is at least 1.
    """

    def __init__(self, balanced: bool, per_class: int | None, total: int | None) -> None:
        if (per_class is None) == (total is None):
            raise MethodError(f"a buffer is bounded by either per_class={per_class} or total={total}; give one of them")
        if (per_class or total or 0) < 1:
            raise MethodError(f"a buffer of per_class={per_class}, total={total} holds no image; give at least 1")
        self.balanced, self.per_class, self.total = balanced, per_class, total
        self.classes = 0
        """Number of classes seen so far."""
        self.added: Counter[tuple[int, int]] = Counter()
        """Images added so far, by task and label."""
        self._slots, self._count = _NO_SAMPLES, 0  # the first `_count` slots are taken

    def __len__(self) -> int:
        return self._count

    @property
    def capacity(self) -> int:
        """How many images it may hold now."""
        return self.total or (self.per_class or 0) * self.classes

    @property
    def kept(self) -> Samples:
        """The samples that it holds."""
        return Samples(*(part[: self._count] for part in self._slots))

    def draw(self, count: int) -> Samples:
        """Copies samples at random without replacement: as many as `count`, or all if it holds fewer."""
        return self._slots.take(torch.randperm(len(self))[:count])

    def add(self, samples: Samples) -> None:
        """Offers samples, on any device, to the buffer in order."""
        samples = samples.to(torch.device("cpu"))
        random = torch.Generator().manual_seed(self.added.total())
        choose = self._balanced_slots if self.balanced else self._reservoir_slots
        slots = choose(_keys(samples), random)
        if slots:
            self._put(slots, samples)

    def state(self) -> dict[str, Tensor]:
        """The content and the counts, as tensors."""
        added = torch.tensor([[*key, count] for key, count in self.added.items()]).view(-1, 3)
        kept = {name: part.clone() for name, part in self.kept._asdict().items()} if len(self) else {}
        return {"classes": torch.tensor(self.classes), "added": added} | kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `state` returned; raises a PatchError if it does not fit this buffer."""
        try:
            self.classes = int(state["classes"])
            self.added = Counter({(task, label): count for task, label, count in state["added"].tolist()})
            self._slots = Samples(*(state[name] for name in Samples._fields)) if "images" in state else _NO_SAMPLES
        except (KeyError, ValueError) as cause:
            raise PatchError(f"the shared state has no buffer of images ({cause}); train the tasks again") from cause
        self._count = len(self._slots.labels)
        if self._count > self.capacity or any(len(part) != self._count for part in self._slots):
            raise PatchError(
                f"the buffer of the shared state does not fit one of {self.capacity} images; train the tasks again"
            )

    def _reservoir_slots(self, keys: Sequence[tuple[int, int]], random: torch.Generator) -> dict[int, int]:
        """Maps slots to the positions of the samples that get them; of two samples for a slot, the later one wins."""
        slots, held = {}, len(self)
        for i, key in enumerate(keys):
            self.added[key] += 1
            slot = held if held < self.capacity else _below(self.added.total(), random)
            if slot < self.capacity:
                slots[slot] = i
                held = max(held, slot + 1)
        return slots

    def _balanced_slots(self, keys: Sequence[tuple[int, int]], random: torch.Generator) -> dict[int, int]:
        """The same, with classes kept equally frequent."""
        members: dict[tuple[int, int], list[int]] = {}
        for slot, key in enumerate(_keys(self.kept)):
            members.setdefault(key, []).append(slot)
        slots, held = {}, len(self)
        for i, key in enumerate(keys):
            self.added[key] += 1
            own = members.setdefault(key, [])
            largest = max(members.values(), key=len)
            if held < self.capacity:
                slot, held = held, held + 1
                own.append(slot)
            elif len(own) < len(largest):
                slot = largest.pop(_below(len(largest), random))
                own.append(slot)
            else:
                position = _below(self.added[key], random)
                if position >= len(own):
                    continue
                slot = own[position]
            slots[slot] = i
        return slots

    def _put(self, slots: dict[int, int], samples: Samples) -> None:
        """Writes samples into slots; memory for all slots is reserved at once, but used only when written."""
        held = self._slots if len(self) else samples.take(torch.empty(0, dtype=torch.long))
        width = max(held.logits.shape[1], samples.logits.shape[1])
        held, samples = (each._replace(logits=widen(each.logits, width)) for each in (held, samples))
        if len(held.labels) < self.capacity:
            short, held = held, Samples(*(part.new_empty(self.capacity, *part.shape[1:]) for part in held))
            for part, old in zip(held, short, strict=True):
                part[: len(old)] = old
        where, which = torch.tensor(list(slots)), torch.tensor(list(slots.values()))
        for part, new in zip(held, samples, strict=True):
            part[where] = new[which]
        self._slots, self._count = held, max(self._count, max(slots) + 1)


class Replay(Guard):
    """A piece that trains on images of earlier tasks again; its arguments are those of `Buffer`.

    As in the reference implementations, the buffer holds images before augmentation, and replayed images are augmented
    again, each as its own task asks.
    """

    keeps_heads = True

    def __init__(self, balanced: bool, per_class: int | None, total: int | None) -> None:
        super().__init__()
        self.buffer = Buffer(balanced, per_class, total)

    @property
    def task(self) -> int:
        """Position of the current task."""
        return len(self.learner.old_heads)

    def begin_task(self) -> None:
        """Raises the capacity for the classes of the task."""
        self.buffer.classes += self.learner.current()[1].out_features

    def restart(self) -> None:
        """Keeps the buffer."""

    def keep(self, step: Step) -> None:
        """Offers the images of a step, from all processes, to the buffer."""
        images = to_uint8(self.learner.plain_images)
        tasks = torch.full_like(step.labels, self.task)
        own = Samples(images, step.labels, tasks, step.logits.detach().float())
        for samples in _of_all_processes(own if step.counts else own.take(torch.empty_like(tasks[:0]))):
            if len(samples.labels):
                self.buffer.add(samples)

    def draw_images(self, step: Step) -> tuple[Tensor, Samples]:
        """Draws as many samples as a step has images; returns their images, augmented again, and the samples.

        The images (B, 3, S, S) are in [0, 1]. Both results are on the device of the step.
        """
        samples = self.buffer.draw(len(step.labels))
        images = self.learner.augment(samples.images, samples.tasks)
        return images.to(step.images) / 255, samples.to(step.images.device)

    def draw(self, step: Step) -> tuple[Tensor, Samples]:
        """Draws as many samples as a step has images; returns what their own heads output now (B, C), and the samples.

        The images are augmented again. Both results are on the device of the step.
        """
        images, samples = self.draw_images(step)
        return self.learner.own_logits(self.learner.current()[0](images), samples.tasks), samples

    def shared_state(self) -> dict[str, Tensor]:
        """The buffer."""
        return self.buffer.state()

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads the buffer."""
        self.buffer.load_state(state)

    training_state, load_training_state = shared_state, load_shared_state  # the buffer in the middle of a task


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as bytes."""
    return (images * 255).round().to(torch.uint8)


def widen(logits: Tensor, width: int) -> Tensor:
    """Pads logits (N, C) to (N, width) by minus infinity."""
    return F.pad(logits, (0, width - logits.shape[1]), value=-torch.inf)


def _below(bound: int, random: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=random))


def _keys(samples: Samples) -> list[tuple[int, int]]:
    """Task and label of each sample."""
    return list(zip(samples.tasks.tolist(), samples.labels.tolist(), strict=True))


def _of_all_processes(samples: Samples) -> list[Samples]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [samples]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, tuple(samples.to(torch.device("cpu"))))
    return [Samples(*part) for part in parts]
