"""The nearest class mean (Mensink et al., TPAMI 2013)."""

from torch import Tensor

from recast_pl.methods.joint_classifier import JointClassifier, Scores, class_sums, linear


class NCM(JointClassifier):
    """An image belongs to the class whose mean is the nearest.

    Mensink, Verbeek, Perronnin and Csurka, "Distance-Based Image Classification: Generalizing to New Classes at
    Near-Zero Cost", TPAMI 2013, without a learned metric: argmin ‖x − μ_c‖². The score is
    xᵀμ_c − ½‖μ_c‖², which has the same order.
    """

    def __init__(self) -> None:
        super().__init__()

    def _measure(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"sums": class_sums(x, labels)}

    def _solve(self) -> Scores:
        return linear(self.means, -self.means.square().sum(1) / 2)
