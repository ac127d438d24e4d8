"""The demo from beginning to end."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from influence_kit.checkpoints.discovery import checkpoint_table
from influence_kit.demo import report
from influence_kit.demo.digits import (
    Digits,
    Settings,
    accuracy,
    flip_labels,
    load_digits_split,
    one_thread,
    train_network,
)
from influence_kit.demo.findings import Detection, Explained, detect, explain
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import checkpoint_losses
from influence_kit.methods.tracin.tracin import TracInCP


class Result(NamedTuple):
    """What the demo found, and the files that it wrote."""

    digits: Digits
    given_labels: Tensor
    is_wrong: Tensor
    test_accuracy: float
    explained: Explained
    detections: dict[str, Detection]
    files: list[Path]


@one_thread()
def run(
    output: str | Path = "influence_kit_demo",
    settings: Settings | None = None,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> Result:
    """Train on digits with wrong labels, explain three test images, find the wrong labels.

    Args:
        output: the folder for checkpoints, figures and the page; created if it does not exist.
        settings: of the demo; the defaults take about ten seconds.
        say: called with each part of the report as soon as it is ready.
        show_progress: progress bars while training and scoring.

    Raises:
        InvalidArgumentError: if ``output`` is a file.
        ModuleNotFoundError: if scikit-learn, which contains the digits, is not installed.
    """
    settings, folder = settings or Settings(), _made(Path(output))
    digits = load_digits_split(seed=settings.seed)
    given, is_wrong = flip_labels(digits.train_labels, settings.wrong_share, settings.seed)
    say(report.data_text(digits, is_wrong))

    train = TensorDataset(digits.train_images, given)
    model, checkpoints = train_network(
        digits.train_images, given, folder / "checkpoints", settings, show_progress
    )
    test_accuracy = accuracy(model, digits.test_images, digits.test_labels)
    say(f"Checkpoints saved while training:\n\n{checkpoint_table(checkpoints)}")
    say(f"Accuracy on the test images: {test_accuracy:.1%}")

    loss_fn = nn.CrossEntropyLoss(reduction="none")
    tracin = TracInCP(model, train, checkpoints, loss_fn=loss_fn)
    test = digits.test_images, digits.test_labels
    explained = explain(tracin, model, *test, settings.k, show_progress)
    say(f"WHICH TRAINING IMAGES HELPED, WHICH HURT (TracInCP)\n\n{report.SCORE_MEANING}")
    say(report.explained_text(explained, given, digits.train_labels))

    suspicion = tracin.self_influence(show_progress=show_progress)
    losses = checkpoint_losses(model, train, checkpoints, loss_fn)
    detections = detect(suspicion, losses, is_wrong)
    say(f"WHICH TRAINING LABELS ARE WRONG\n\n{report.detection_text(detections)}")

    pictures = report.figures(digits, given, is_wrong, explained, detections)
    page = report.page(
        tracin, digits, given, explained, detections, pictures["detection_curves.png"]
    )
    files = [*checkpoints, *report.save(pictures, folder), page.write(folder / "report.html")]
    say(
        f"Everything on one page: report.html. Figures: {', '.join(pictures)}.\n"
        f"They are, with the checkpoints, in\n{folder.resolve()}"
    )
    return Result(digits, given, is_wrong, test_accuracy, explained, detections, files)


def _made(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"the output '{folder}' is a file; pass a folder to write to")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder
