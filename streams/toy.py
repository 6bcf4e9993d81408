"""Points in the plane, some of which changed class; small enough to draw."""

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from grace_bench.common.files import readable
from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.errors import UserError
from grace_bench.registry import register_stream

if TYPE_CHECKING:
    import torch
    from torch import nn

    PointEncoder = Callable[[Sequence[str]], dict[str, torch.Tensor]]

EXTENT = 3.0
HIDDEN_SIZE = 100
TRAINING_STEPS = 600
MODEL_TYPE = "point-classifier"


class Region(NamedTuple):
    """A disc, by its centre and radius."""

    x: float
    y: float
    radius: float

    def distance(self, point: tuple[float, float]) -> float:
        """Returns the distance of a point to the disc's edge; negative inside."""
        return math.dist((self.x, self.y), point) - self.radius


TURNED = Region(-1.2, 1.8, 0.6)
TURNED_FOR_VALIDATION = Region(1.2, -1.8, 0.6)
CLEARANCE = 0.3
"""The minimum distance of all other points to the turned regions and to the border between the classes."""

_PROMPT = re.compile(r"\(\s*([-+]?\d+(?:\.\d+)?)\s*,\s*([-+]?\d+(?:\.\d+)?)\s*\)")


@register_stream("toy")
class Toy(EditStream):
    """Points in the plane, with one region that changed class, after Figure 2 of the GRACE paper.

    The curve `y = sin(2x)` separates the classes. After the model was trained, the points inside a disc changed to the
    other class; the edits are points of this disc. A prompt is a point as text, such as `(0.3125, -1.2000)`.
    """

    task: TaskName = "classification"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="generated: points in the plane, after Figure 2 of the GRACE paper",
        revision="1",
        license="MIT",
        citation="Hartvigsen et al., Aging with GRACE, NeurIPS 2023",
        main_score="accuracy",
    )
    default_model: ClassVar[str | None] = "toy"
    default_layer: ClassVar[str | None] = "second"
    search_layers: ClassVar = {"any": ("second",)}

    def load(self) -> StreamData:
        """Returns 100 edits and 100 holdout points in the turned disc, 400 upstream and 50 validation points."""
        inside = list(islice(_points_in(TURNED, random.Random(1)), 200))
        validation = list(islice(_points_in(TURNED_FOR_VALIDATION, random.Random(2)), 50))
        elsewhere = list(islice(_points_elsewhere(random.Random(3)), 400))
        return StreamData(
            edits=_requests("edit", "turned", inside[:100], turned=True),
            holdout=_requests("holdout", "turned", inside[100:], turned=True),
            upstream=_requests("upstream", "elsewhere", elsewhere, turned=False),
            validation=_requests("validation", "turned-for-validation", validation, turned=True),
            label_names=("below", "above"),
        )

    @classmethod
    def load_model(cls, folder: Path) -> tuple["nn.Module", "PointEncoder"]:
        """Loads a classifier of points, and the function that turns B prompts into `points` of shape (B, 2).

        Raises:
            UserError: If the folder does not hold such a model.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from grace_bench.streams._toy_model import PointClassifier

        config_path, weights = folder / "config.json", folder / "model.safetensors"
        try:
            config = json.loads(readable(config_path).read_text(encoding="utf-8"))
            if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
                raise UserError(f"{config_path}: field 'model_type': should be '{MODEL_TYPE}'")
            hidden_size = config.get("hidden_size")
            if type(hidden_size) is not int or hidden_size < 1:
                raise UserError(f"{config_path}: field 'hidden_size': should be a positive integer")
            model = PointClassifier(hidden_size=hidden_size)
            model.load_state_dict(load_file(readable(weights)))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: holds no {MODEL_TYPE} ({str(error).splitlines()[0]})") from error

        def encode(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
            return {"points": torch.tensor([parse_point(prompt) for prompt in prompts], dtype=torch.float32)}

        return model.eval(), encode

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains the classifier on 2,000 points of the whole square, labelled as before any region turned."""
        import torch
        from safetensors.torch import save_file

        from grace_bench.streams._pretraining import refuse_base, seeded
        from grace_bench.streams._toy_model import PointClassifier

        refuse_base(self, base)
        points = list(islice(_points(random.Random(f"training {seed}")), 2000))
        inputs = torch.tensor(points)
        labels = torch.tensor([label_before(point) for point in points])
        with seeded(seed):
            # A step takes a few milliseconds; handing work to a second thread takes longer than the work itself.
            torch.set_num_threads(1)
            model = PointClassifier(hidden_size=HIDDEN_SIZE)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
            for step in range(TRAINING_STEPS):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress("training", step + 1, TRAINING_STEPS)
        out_dir.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, "hidden_size": HIDDEN_SIZE}
        (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            out_dir / "model.safetensors",
            metadata={"format": "pt"},
        )
        reloaded, encode = self.load_model(out_dir)
        data = self.load()
        figures = {
            f"{name}_accuracy": _accuracy(reloaded, encode, getattr(data, name))
            for name in ("upstream", "edits", "holdout", "validation")
        }
        (out_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        return figures


def label_before(point: tuple[float, float]) -> int:
    """Returns the class of a point before any region turned: 1 above `y = sin(2x)`, 0 below."""
    return int(_height(point) > 0)


def parse_point(prompt: str) -> tuple[float, float]:
    """Parses a point.

    >>> parse_point("(0.3125, -1.2000)")
    (0.3125, -1.2)

    Raises:
        UserError: If the text is not a point.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise UserError(f"prompt {prompt[:60]!r}: should be a point such as '(0.3125, -1.2000)'")
    return float(match[1]), float(match[2])


def _height(point: tuple[float, float]) -> float:
    return point[1] - math.sin(2 * point[0])


def _points(source: random.Random) -> Iterator[tuple[float, float]]:
    """Yields points of the whole square, rounded to the four decimals of their prompts."""
    while True:
        # Of this generator's methods, only random() is guaranteed to give the same numbers in every Python version.
        x, y = (round(EXTENT * (2 * source.random() - 1), 4) for _ in range(2))
        yield x, y


def _points_in(region: Region, source: random.Random) -> Iterator[tuple[float, float]]:
    return (point for point in _points(source) if region.distance(point) <= 0)


def _points_elsewhere(source: random.Random) -> Iterator[tuple[float, float]]:
    return (
        point
        for point in _points(source)
        if min(TURNED.distance(point), TURNED_FOR_VALIDATION.distance(point), abs(_height(point))) > CLEARANCE
    )


def _requests(name: str, fact: str, points: Sequence[tuple[float, float]], *, turned: bool) -> tuple[EditRequest, ...]:
    return tuple(
        EditRequest(
            id=f"{name}/{index}",
            prompt=f"({x:.4f}, {y:.4f})",
            target=label_before((x, y)) ^ turned,
            fact=fact,
        )
        for index, (x, y) in enumerate(points)
    )


def _accuracy(
    model: "nn.Module",
    encode: "PointEncoder",
    requests: Sequence[EditRequest],
) -> float:
    import torch

    with torch.inference_mode():
        predicted = model(**encode([request.prompt for request in requests])).argmax(dim=-1).tolist()
    right = sum(label == request.target for label, request in zip(predicted, requests, strict=True))
    return right / len(requests)
