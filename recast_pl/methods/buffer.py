"""Pieces that guard old tasks by training on some of their images again."""

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
    """Images that are kept.

    Args:
        images: uint8 (N, 3, S, S).
        labels: Class indices (N,), each within its own task.
        tasks: Positions of their tasks (N,).
        logits: What their own heads said when they were inserted (N, C); minus infinity beyond a head's classes.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    logits: Tensor

    def take(self, which: Tensor) -> "Samples":
        """Some of them."""
        return Samples(*(part[which] for part in self))

    def to(self, device: torch.device) -> "Samples":
        """The same on a device."""
        return Samples(*(part.to(device) for part in self))

    @property
    def pixels(self) -> Tensor:
        """The images in [0, 1]."""
        return self.images.float() / 255


class Buffer:
    """A bounded memory of images on the CPU, of 3·S² bytes each.

    Which images stay depends on what was added and in which order alone, so that processes which add the same keep
    the same.

    Args:
        balanced: Whether classes are kept equally frequent: an image of the most frequent class leaves for one of a
            rarer class, and each class keeps its images with equal probability (Chrysakis and Moens, 2020). Otherwise
            every image ever added is kept with equal probability, by reservoir sampling (Vitter, 1985).
        per_class: Images for each class seen so far; None to bound them in all.
        total: Images in all; None to bound them by class.

    Raises:
        MethodError: If not just one bound is given, or it is below 1.
    """

    def __init__(self, balanced: bool, per_class: int | None, total: int | None) -> None:
        if (per_class is None) == (total is None):
            raise MethodError(f"a buffer is bounded by either per_class={per_class} or total={total}; give one of them")
        if (per_class or total or 0) < 1:
            raise MethodError(f"a buffer of per_class={per_class}, total={total} holds no image; give at least 1")
        self.balanced, self.per_class, self.total = balanced, per_class, total
        self.classes = 0
        """Classes that there is room for."""
        self.added: Counter[tuple[int, int]] = Counter()
        """Images added so far, by task and label."""
        self._room: Samples | None = None  # of which the first are taken
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def capacity(self) -> int:
        """Images that it may hold now."""
        return self.total or (self.per_class or 0) * self.classes

    @property
    def kept(self) -> Samples | None:
        """What it holds; None before anything was added."""
        return None if self._room is None else Samples(*(part[: self._count] for part in self._room))

    def draw(self, count: int, device: torch.device) -> Samples:
        """Takes images at random, none twice, without removing them.

        Args:
            count: How many, or all if there are less.
            device: Where they are to be.
        """
        assert self._room is not None
        return self._room.take(torch.randperm(len(self))[:count]).to(device)

    def add(self, samples: Samples) -> None:
        """Offers images, in order.

        Args:
            samples: On any device.
        """
        samples = samples.to(torch.device("cpu"))
        random = torch.Generator().manual_seed(self.added.total())
        choose = self._balanced_slots if self.balanced else self._reservoir_slots
        slots = choose(_keys(samples), random)
        if slots:
            self._put(slots, samples)

    def state(self) -> dict[str, Tensor]:
        """All that it holds, as tensors."""
        added = torch.tensor([[*key, count] for key, count in self.added.items()]).view(-1, 3)
        kept = {} if self.kept is None else {name: part.clone() for name, part in self.kept._asdict().items()}
        return {"classes": torch.tensor(self.classes), "added": added} | kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes `state` back.

        Raises:
            PatchError: If it is not that of a buffer like this.
        """
        try:
            self.classes = int(state["classes"])
            self.added = Counter({(task, label): count for task, label, count in state["added"].tolist()})
            self._room = Samples(*(state[name] for name in Samples._fields)) if "images" in state else None
        except (KeyError, ValueError) as cause:
            raise PatchError(f"the shared state holds no buffer of images ({cause}); learn the tasks anew") from cause
        self._count = 0 if self._room is None else len(self._room.labels)
        if self._count > self.capacity or any(len(part) != self._count for part in self._room or ()):
            raise PatchError(
                f"the buffer of the shared state does not fit one of {self.capacity}; learn the tasks again"
            )

    def _reservoir_slots(self, keys: Sequence[tuple[int, int]], random: torch.Generator) -> dict[int, int]:
        """Which slot each image that is accepted gets, the later one if there are two."""
        slots, held = {}, len(self)
        for i, key in enumerate(keys):
            self.added[key] += 1
            slot = held if held < self.capacity else _below(self.added.total(), random)
            if slot < self.capacity:
                slots[slot] = i
                held = max(held, slot + 1)
        return slots

    def _balanced_slots(self, keys: Sequence[tuple[int, int]], random: torch.Generator) -> dict[int, int]:
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
        room = samples.take(torch.empty(0, dtype=torch.long)) if self._room is None else self._room
        width = max(room.logits.shape[1], samples.logits.shape[1])
        room = room._replace(logits=widen(room.logits, width))
        if len(room.labels) < self.capacity:  # all at once, and the memory is used when it is written
            room = Samples(*(_lengthen(part, self.capacity) for part in room))
        where, which = torch.tensor(list(slots)), torch.tensor(list(slots.values()))
        for part, new in zip(room, samples._replace(logits=widen(samples.logits, width)), strict=True):
            part[where] = new[which]
        self._room, self._count = room, max(self._count, max(slots) + 1)


class Replay(Guard):
    """A guard with a buffer.

    Args:
        balanced: As for `Buffer`.
        per_class: Images kept of each class; None to bound them in all.
        total: Images kept in all; None to bound them by class.
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
        """Makes room for the classes of the task."""
        assert self.learner.head is not None
        self.buffer.classes += self.learner.head.out_features

    def restart(self) -> None:
        """Keeps the buffer."""

    def keep(self, step: Step) -> None:
        """Offers the images of a step, of all processes, to the buffer."""
        images = (step.images * 255).round().to(torch.uint8)
        tasks = torch.full_like(step.labels, self.task)
        for samples in _of_all_processes(Samples(images, step.labels, tasks, step.logits.detach().float())):
            self.buffer.add(samples)

    def shared_state(self) -> dict[str, Tensor]:
        """The buffer."""
        return self.buffer.state()

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes the buffer back."""
        self.buffer.load_state(state)

    def training_state(self) -> dict[str, Tensor]:
        """The buffer, as it is in the middle of a task."""
        return self.buffer.state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes the buffer back."""
        self.buffer.load_state(state)

    def logits(self, samples: Samples) -> Tensor:
        """What the samples' own heads say now (B, C)."""
        assert self.learner.backbone is not None
        return self.learner.own_logits(self.learner.backbone(samples.pixels), samples.tasks)


def _below(bound: int, random: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=random))


def _keys(samples: Samples | None) -> list[tuple[int, int]]:
    """Task and label of each."""
    return [] if samples is None else list(zip(samples.tasks.tolist(), samples.labels.tolist(), strict=True))


def _lengthen(part: Tensor, count: int) -> Tensor:
    longer = part.new_empty(count, *part.shape[1:])
    longer[: len(part)] = part
    return longer


def widen(logits: Tensor, width: int) -> Tensor:
    return F.pad(logits, (0, width - logits.shape[1]), value=-torch.inf)


def _of_all_processes(samples: Samples) -> list[Samples]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [samples]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, tuple(samples.to(torch.device("cpu"))))
    return [Samples(*part) for part in parts]
