"""Hypernetwork: one recurrent generator, shared by all tasks, makes the coefficients of all layers from an embedding.

Von Oswald et al., "Continual learning with hypernetworks", ICLR 2020; recurrent over the layers as in Chandra et al.,
"Continual Learning with Dependency Preserving Hypernetworks", WACV 2023.

    h_l(e) = GRU([e, z_l], h_(l−1)(e)) and f_l(e) = V·(h_l(e) − h_l(0)) for the layers l = 1 … L, with h_0 = 0
    C_l = C⁰_l + f_l(e_t)
    loss = cross-entropy + β/(t−1) · Σ_(s<t) ‖f(e_s) − f*_s‖²

e_t is the embedding of task t, z_l that of layer l, and C⁰_l are the coefficients of the pretrained weights in the
templates of RECAST. f(e) are the changes of the coefficients of all layers, and f*_s those of an earlier task as they
were before the present task began.

Deviations:
- The generator makes changes of RECAST's coefficients. In the sources it makes all weights, and they start at random.
- Embeddings start at 0, where changes are 0, so that every task starts from the pretrained weights. In the sources they
  start at random, so that a task starts from what earlier tasks have left there.
- The penalty is that of von Oswald et al. without the look-ahead, which computes it after a candidate step of the
  optimizer. Chandra et al. have another penalty, and let the generator grow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.bank import TemplateBank
from recast_pl.decomposition.parametrization import Mixture
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import Adaptation
from recast_pl.methods.piece import Step, check_state, copies
from recast_pl.methods.templates import TemplatePiece


class Generator(nn.Module):
    """The recurrent generator, and the embedding of the present task.

    Args:
        layers: L.
        coefficients: n, how many it makes for a layer.
        size: E, numbers of an embedding of a task, and of a layer.
        hidden: Numbers of the state.
    """

    def __init__(self, layers: int, coefficients: int, size: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(size))
        self.layers = nn.Parameter(torch.empty(layers, size))
        self.cell = nn.GRUCell(2 * size, hidden)
        self.output = nn.Linear(hidden, coefficients, bias=False)

    def reset(self) -> None:
        """Draws new random values for everything but the embedding, which is 0."""
        nn.init.zeros_(self.embedding)
        nn.init.normal_(self.layers)
        self.cell.reset_parameters()
        self.output.reset_parameters()

    def states(self, embeddings: Tensor, layers: int) -> list[Tensor]:
        """The states (T, hidden) at each of the first layers, for T embeddings (T, E), less those for 0."""
        inputs = F.pad(embeddings, (0, 0, 0, 1))  # (T + 1, E)
        state, states = inputs.new_zeros(len(inputs), self.cell.hidden_size), []
        for layer in self.layers[:layers]:
            state = self.cell(torch.cat([inputs, layer.expand_as(inputs)], 1), state)
            states.append(state[:-1] - state[-1])
        return states

    def forward(self, embeddings: Tensor) -> Tensor:
        """Changes of the coefficients of all layers (T, L, n) for the embeddings of T tasks (T, E)."""
        changes: Tensor = self.output(torch.stack(self.states(embeddings, len(self.layers)), 1))
        return changes

    def change(self, layer: int) -> Tensor:
        """The change of the coefficients (n,) of one layer, counted from 0, for the present task."""
        change: Tensor = self.output(self.states(self.embedding[None], layer + 1)[-1])
        return change[0]


class Generated(Adaptation):
    """W + Σ_i δ_i·T_i, where the generator makes δ; arguments as in `Mixture`, and the position of the layer."""

    bank: TemplateBank
    generator: Generator

    def __init__(self, bank: TemplateBank, generator: Generator, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.__dict__["bank"] = bank
        if layer == 0:  # it owns the generator, and the others only refer to it
            self.generator = generator
        else:
            self.__dict__["generator"] = generator

    def change(self, weight: Tensor) -> Tensor:
        """The weight of the task."""
        return weight + self.bank.mix(self.generator.change(self.layer)[None, : len(self.bank.templates)])


class Hypernetwork(TemplatePiece):
    """One recurrent generator of coefficients for all layers (von Oswald et al., 2020; Chandra et al., 2023).

    A task has an embedding of its own. The generator reads it, steps over the layers, and makes for each the change of
    the coefficients of RECAST's templates. All tasks train it further; a penalty keeps what it makes for earlier tasks.

    Args:
        layout: Which weights share templates, and how many; they are solved in closed form when training starts.
        decomposition: Path of a `decomposition.safetensors` to use instead, from `MimicryModule` or another run.
        size: E, numbers of the embedding of a task, which are all that its patch holds of this piece.
        hidden: Numbers of the state of the generator.
        strength: β, of the penalty; 0 for none. Choose it on validation images.
        learning_rate: Learning rate of embeddings and generator; None for that of the head.

    Raises:
        DecompositionError: If neither or both of layout and decomposition are given.
        MethodError: If `size` or `hidden` is below 1, or the strength negative.
    """

    isolated = False
    generator: Generator
    """Set by `attach`."""

    def __init__(
        self,
        layout: BankLayout | None = None,
        decomposition: str | None = None,
        size: int = 8,
        hidden: int = 32,
        strength: float = 1.0,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(layout, decomposition, learning_rate)
        if min(size, hidden) < 1 or strength < 0:
            given = f"size={size} and hidden={hidden} must be at least 1, and strength={strength} not negative"
            raise MethodError(f"Hypernetwork: {given}")
        self.size, self.hidden, self.strength = size, hidden, strength

    def attach(self, network: nn.Module) -> None:
        """Installs the decomposition, whose coefficients stay, and the generator."""
        super().attach(network)
        for coefficients in self.parameters.values():
            coefficients.requires_grad_(False)
        most = max(len(bank.templates) for bank in self.decomposition.banks)
        self.generator = Generator(len(self.parameters), most, self.size, self.hidden)
        for layer, name in enumerate(self.parameters):
            path, _, attribute = name.rpartition(".")
            module = network.get_submodule(path)
            mixture = module.parametrizations[attribute][0]  # type: ignore[index]
            assert isinstance(mixture, Mixture)
            parametrize.register_parametrization(module, attribute, Generated(mixture.bank, self.generator, layer))
        self.parameters = dict(self.generator.named_parameters())
        self.restart()

    @torch.no_grad()
    def begin_task(self) -> None:
        """The embedding is 0; the generator stays."""
        nn.init.zeros_(self.generator.embedding)

    def restart(self) -> None:
        """Draws a new generator, too."""
        self.generator.reset()

    def loss(self, step: Step) -> Tensor | None:
        """β times the mean over earlier tasks of ‖f(e) − f*‖²; None if there are none."""
        kept = self.memory.tensors
        if not kept or not self.strength:
            return None
        moved: Tensor = self.generator(kept["embeddings"]) - kept["changes"]  # (T, L, n)
        return self.strength * moved.square().sum((1, 2)).mean()

    @torch.no_grad()
    def end_task(self) -> None:
        """Keeps the embedding, and what the generator makes for it and for those of all earlier tasks now."""
        embeddings = self.generator.embedding[None]
        if self.memory.tensors:
            embeddings = torch.cat([self.memory.tensors["embeddings"], embeddings])
        self.memory.keep({"embeddings": embeddings.clone(), "changes": self.generator(embeddings)})

    def task_state(self) -> dict[str, Tensor]:
        """The embedding (E,)."""
        return copies({"embedding": self.generator.embedding})

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads the embedding."""
        self._load(state, {"embedding": self.generator.embedding})

    def shared_state(self) -> dict[str, Tensor]:
        """The generator, and for each task its embedding and the changes (L, n) that the generator made for it."""
        return copies(self._shared() | self.memory.tensors)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads them."""
        kept = {name: tensor for name, tensor in state.items() if name in ("embeddings", "changes")}
        self._load({name: tensor for name, tensor in state.items() if name not in kept}, self._shared())
        tasks = len(kept.get("embeddings", ()))
        shape = (len(self.generator.layers), self.generator.output.out_features)
        check_state("Hypernetwork", kept, {"embeddings": (tasks, self.size), "changes": (tasks, *shape)})
        self.memory.keep(kept)

    def _shared(self) -> dict[str, Tensor]:
        """What all tasks train: everything but the embedding."""
        return {name: tensor for name, tensor in self.parameters.items() if name != "embedding"}
