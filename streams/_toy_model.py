"""The classifier of points in the plane, in a module of its own so that loading the stream needs no torch."""

from torch import Tensor, nn


class PointClassifier(nn.Module):
    """A perceptron with two hidden layers and two classes.

    Args:
        hidden_size: The width of both hidden layers.
    """

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, hidden_size)
        self.second = nn.Linear(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Returns logits of shape (B, 2) for points of shape (B, 2)."""
        logits: Tensor = self.head(self.second(self.first(points).relu()).relu())
        return logits
