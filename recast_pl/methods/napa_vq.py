"""NAPA-VQ: one coding vector for each class; classes that lie side by side are pushed apart and blended.

Malepathirana, Senanayake and Halgamuge, "NAPA-VQ: Neighborhood-Aware Prototype Augmentation with Vector Quantization
for Continual Learning", ICCV 2023. The formulas and constants are read from the authors' code.

    d_c(x) = ‖x − m_c‖ for the coding vectors m of all classes; N(y) are the neighbours of class y, e_yc > 0, c ≠ y
    NA(x, y) = max(0, d_y² − Σ_{c∈N(y)} w_c·d_c²), w = softmax of −d_c²/1000 over N(y), without gradient
    CE(x, y) = cross-entropy of softmax(−d(x) / T)
    loss = CE(f, y) + NA(f, y) + λ·CE(z, i) + NA(z, i) + μ·‖F − F₀‖
    z = γ·p_i + (1 − γ)·p_j, γ from 0.5 to 1, i any old class, j any class with e_ij > 0, which may be i itself

f are the features of an image, F those of a batch as one matrix, F₀ those by the network before the task, p the mean
features of classes. The last three terms begin with the second task. Edges e are learnt by competitive Hebbian
learning: the class whose m is nearest to x is tied to those of the k nearest (e = 1), and its other edges fade
(e ← 0.9·e) and end below 0.9¹⁰, whatever the order in a batch. Then e and its transpose are averaged. Coding vectors of
old classes do not change. After a task, an image belongs to the class of the highest cosine between f and m.

Deviations: images are not rotated to make four classes of each class. Coding vectors of new classes start at the mean
features of the class, not at random, as the network is pretrained and the optimizer of the heads trains them; the
authors train them by gradient descent at a rate of 5 for the first task and of 0.5 for later ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.guard import Guard
from recast_pl.methods.piece import Step, check_state, copies, sum_over_processes

_FADING = 0.9
_SHORTEST = _FADING**10
_SPREAD = 1e-3
_STATE = ("edges", "vectors", "prototypes")


class NAPAVQ(Guard):
    """NAPA-VQ (Malepathirana et al., 2023): coding vectors, neighbourhoods of classes, and blended prototypes.

    List it after `FineTune`, which trains the weights. While a task is trained, the rows of its head are the coding
    vectors; afterwards they have unit norm. `--evaluation class` measures the heads of all tasks as one classifier.

    Args:
        neighbours: k, how many coding vectors nearest to an image take part in learning edges; fewer if there are
            fewer classes. Images of the authors have four classes each.
        temperature: T.
        prototypes: λ, the weight of the cross-entropy of blended prototypes.
        distillation: μ, the weight of the distance from the features before the task.

    Raises:
        MethodError: If k is below 1, T not positive, or a weight negative.
    """

    keeps_heads = True
    solvable_head = False

    def __init__(
        self,
        neighbours: int = 15,
        temperature: float = 0.1,
        prototypes: float = 10.0,
        distillation: float = 10.0,
    ) -> None:
        super().__init__()
        if neighbours < 1 or temperature <= 0:
            raise MethodError(
                f"NAPAVQ: neighbours={neighbours} must be at least 1, and temperature={temperature} positive"
            )
        if prototypes < 0 or distillation < 0:
            raise MethodError(f"NAPAVQ: prototypes={prototypes} and distillation={distillation} must not be negative")
        self.neighbours, self.temperature = neighbours, temperature
        self.prototypes, self.distillation = prototypes, distillation

    @property
    def old_classes(self) -> int:
        """How many classes earlier tasks have."""
        return sum(head.get_parameter("bias").numel() for head in self.learner.old_heads)

    def begin_task(self) -> None:
        """Makes room for the classes of the task, freezes the heads of earlier ones and copies the network."""
        head, old, kept = self.learner.current()[1], self.old_classes, self.memory.tensors
        classes = old + head.out_features
        rows = head.weight.new_zeros(classes, head.in_features)
        state = {"edges": torch.eye(classes).to(rows), "vectors": rows, "prototypes": rows.clone()}
        if old:
            state["edges"][:old, :old] = kept["edges"][:old, :old]
            for name in ("vectors", "prototypes"):
                state[name][:old] = kept[name][:old]
        self.learner.old_heads.requires_grad_(False)
        self.remember_network()
        self.memory.keep(self.memory.tensors | state)

    @torch.no_grad()
    def begin_training(self, head: nn.Linear) -> None:
        """Coding vectors and prototypes of the new classes start at the mean features of the classes."""
        self.learner.current()[1].weight.copy_(self._update_prototypes())
        self.end_step()

    @torch.no_grad()
    def end_step(self) -> None:
        """Sets the biases so that the highest logit of the head is that of the nearest coding vector."""
        head = self.learner.current()[1]
        head.bias.copy_(-head.weight.square().sum(1) / 2)

    def loss(self, step: Step) -> Tensor:
        """What the loss has beside the cross-entropy of the own head, which it takes away."""
        own, old = self.learner.current()[1], self.old_classes
        vectors = torch.cat([self.memory.tensors["vectors"][:old], own.weight])
        features = step.features.to(vectors.dtype)
        logits = -_distances(features, vectors) / self.temperature
        # the own classes come first, as the labels count them
        term = self.learner.loss(logits.roll(own.out_features, 1), step.labels)
        term = term - self.learner.loss(step.logits, step.labels)
        term = term + self.separation(features, old + step.labels, vectors, step.counts)
        if old:
            blends, classes = self.blend(len(step.labels))
            logits = -_distances(blends, vectors) / self.temperature
            term = term + self.prototypes * F.cross_entropy(logits, classes)
            term = term + self.separation(blends, classes, vectors, step.counts)
            with torch.no_grad():
                before = self.features_before(step.images).to(features)
            term = term + self.distillation * (features - before).norm()
        return term

    def separation(self, features: Tensor, classes: Tensor, vectors: Tensor, counts: bool = True) -> Tensor:
        """NA, the mean over features, after they have changed the edges.

        Args:
            features: (B, D).
            classes: (B,), among those of all tasks.
            vectors: The coding vectors of all classes (K, D).
            counts: Whether the features may change the edges.
        """
        edges, squares = self.memory.tensors["edges"], _distances(features, vectors).square()
        nearest = squares.topk(min(self.neighbours, len(vectors)), largest=False).indices  # (B, k), nearest first
        among = counts * F.one_hot(nearest, len(vectors)).sum(1).to(edges)  # (B, K)
        hits = torch.zeros_like(edges).index_add_(0, nearest[:, 0], among)  # times (i, j) with i nearest, j among the k
        sum_over_processes(hits)
        misses = hits.diagonal()[:, None] - hits
        edges.copy_(torch.maximum(edges, (hits > 0).to(edges)) * _FADING**misses)
        edges.mul_(edges >= _SHORTEST)
        others = (edges[classes] > 0) & ~F.one_hot(classes, len(vectors)).bool()  # (B, K)
        edges.copy_((edges + edges.T) / 2)
        scores = (-_SPREAD * squares.detach()).masked_fill(~others, -torch.inf)
        weights = scores.softmax(1).nan_to_num(0)  # 0 for a class without neighbours
        return (squares[torch.arange(len(classes)), classes] - (weights * squares).sum(1)).relu().mean()

    def blend(self, count: int) -> tuple[Tensor, Tensor]:
        """Prototypes of old classes (count, D) blended with those of neighbours, and their classes (count,)."""
        edges, prototypes = self.memory.tensors["edges"], self.memory.tensors["prototypes"]
        classes = torch.randint(self.old_classes, (count,), device=edges.device)
        others = torch.multinomial((edges[classes] > 0).to(edges), 1)[:, 0]
        share = 0.5 + 0.5 * torch.rand(count, 1, device=edges.device, dtype=edges.dtype)
        return share * prototypes[classes] + (1 - share) * prototypes[others], classes

    @torch.no_grad()
    def end_task(self) -> None:
        """Keeps the coding vectors and the mean features of the classes; the rows of the head get unit norm."""
        self._update_prototypes()
        head = self.learner.current()[1]
        self.memory.tensors["vectors"][self.old_classes :] = head.weight
        head.weight.copy_(F.normalize(head.weight))
        head.bias.zero_()

    def shared_state(self) -> dict[str, Tensor]:
        """Edges, coding vectors and prototypes of the classes learnt so far; nothing before the first task."""
        old, kept = self.old_classes, self.memory.tensors
        return copies({n: kept[n][:old, : old if n == "edges" else None] for n in _STATE}) if old else {}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `shared_state` returned; raises a PatchError if it has not all classes of the tasks learnt."""
        weights: list[Tensor] = [head.get_parameter("weight") for head in self.learner.old_heads]
        rows = tuple(torch.cat(weights).shape) if weights else (0, 0)
        shapes = {"edges": (rows[0], rows[0]), "vectors": rows, "prototypes": rows}
        check_state("NAPAVQ", state, shapes if weights else {})
        self.memory.keep(state)

    def training_state(self) -> dict[str, Tensor]:
        """The same of all classes, those of the current task included."""
        return copies({name: self.memory.tensors[name] for name in _STATE})

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `training_state` returned."""
        for name, tensor in state.items():
            self.memory.tensors[name].copy_(tensor)

    def _update_prototypes(self) -> Tensor:
        """Sets the prototypes of the task's classes to the mean features of their training images; returns them."""
        backbone, head = self.learner.current()
        sums, counts = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
        for images, labels in self.learner.batches("train"):
            features = backbone(images).to(sums)
            sums.index_add_(0, labels, features)
            counts.index_add_(0, labels, torch.ones_like(features[:, 0]))
        means = sums / counts[:, None]
        self.memory.tensors["prototypes"][self.old_classes :] = means
        return means


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (B, K) of rows (B, D) from rows (K, D)."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # a product would lose small ones
