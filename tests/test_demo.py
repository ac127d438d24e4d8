"""The demo, made small, and the command line."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from influence_kit import TracInCP, checkpoint_table, demo
from influence_kit.__main__ import main
from influence_kit.demo import report
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import mislabel_auc, recall_at

SMALL = demo.Settings(epochs=6, checkpoints=3, k=2)
PICTURES = ["proponents_and_opponents.png", "suspects.png", "detection_curves.png"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The result, what it said, the folder, and the caller's state before and after."""
    folder = tmp_path_factory.mktemp("demo")
    said = []

    def state():
        return torch.get_rng_state().tolist(), torch.get_num_threads()

    before = state()
    result = demo.run(folder, SMALL, said.append, show_progress=False)
    return result, said, folder, (before, state())


def test_the_files_are_there(ran):
    result, said, folder, _ = ran
    names = [str(path.relative_to(folder)) for path in result.files]
    checkpoints = [f"checkpoints/epoch-0{epoch}.pt" for epoch in (2, 4, 6)]
    assert names == [*checkpoints, *PICTURES, "report.html"]
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(result.files)
    for path in result.files[3:6]:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "report.html" in said[-1]
    assert said[-1].splitlines()[-1] == str(folder.resolve())


def test_checkpoints_hold_the_rate_of_their_epoch(ran):
    result, said, _, _ = ran
    table = checkpoint_table(result.files[:3])
    assert [row.step for row in table] == [2, 4, 6]
    rates = [0.3 * 5 / 6, 0.3 * 3 / 6, 0.3 / 6]
    assert [row.learning_rate for row in table] == pytest.approx(rates)
    assert str(table) in "\n".join(said)


def test_the_network_learns_and_the_wrong_labels_are_found(ran):
    result = ran[0]
    assert result.test_accuracy > 0.9
    assert list(result.detections) == [
        "TracInCP self-influence",
        "loss averaged over checkpoints",
        "loss at the last checkpoint",
    ]
    for detection in result.detections.values():
        assert detection.auc > 0.95
        assert 0.75 < detection.recall <= 1


def test_scores_are_those_of_the_checkpoints(ran):
    """Self-influence by single gradients, and losses by the plain definition."""
    result = ran[0]
    images, labels = result.digits.train_images[:3], result.given_labels[:3]
    model = demo.make_network()
    self_influence, losses = torch.zeros(3), []
    for path in result.files[:3]:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["state_dict"])
        losses.append(cross_entropy(model(images), labels, reduction="none").detach())
        for i in range(3):
            loss = cross_entropy(model(images[i : i + 1]), labels[i : i + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            self_influence[i] += saved["learning_rate"] * sum(g.square().sum() for g in gradients)
    expected = [self_influence, torch.stack(losses).mean(0), losses[-1]]
    for detection, scores in zip(result.detections.values(), expected, strict=True):
        torch.testing.assert_close(detection.scores[:3].float(), scores, rtol=1e-4, atol=1e-6)


def test_explained_images_are_explained_by_tracin(ran):
    result = ran[0]
    digits, explained = result.digits, result.explained
    assert list(explained.places) == ["surest right one", "surest wrong one", "least sure one"]
    model = demo.make_network()
    train = TensorDataset(digits.train_images, result.given_labels)
    tracin = TracInCP(model, train, result.files[:3], loss_fn=nn.CrossEntropyLoss())
    places = list(explained.places.values())
    scores = tracin.influence((digits.test_images[places], digits.test_labels[places]))
    ordered = scores.sort(dim=1, descending=True)
    assert torch.equal(explained.proponents.indices, ordered.indices[:, :2])
    torch.testing.assert_close(explained.proponents.influence_scores, ordered.values[:, :2])
    assert torch.equal(explained.opponents.indices, ordered.indices.flip(1)[:, :2])


def test_the_detection_table_says_what_was_computed(ran):
    result, said, _, _ = ran
    text = next(part for part in said if "WHICH TRAINING LABELS ARE WRONG" in part)
    for name, detection in result.detections.items():
        assert detection.auc == mislabel_auc(detection.scores, result.is_wrong)
        assert detection.recall == recall_at(detection.scores, result.is_wrong, 0.1)
        cells = re.search(rf"^{name} +(\S+) +(\S+)$", text, re.MULTILINE)
        assert cells.groups() == (f"{detection.auc:.4f}", f"{detection.recall:.1%}")
    best = max(detection.auc for detection in result.detections.values())
    named = re.search("Highest AUC: (.+)\\.", text)[1].split(" and ")
    assert named == [name for name, d in result.detections.items() if d.auc == best]


def test_the_explanations_say_what_was_computed(ran):
    result, said, _, _ = ran
    text = "\n".join(said)
    for row, (reason, place) in enumerate(result.explained.places.items()):
        assert f"Test image #{place} ({reason}): true {result.digits.test_labels[place]}," in text
        index = int(result.explained.opponents.indices[row, 0])
        truth = int(result.digits.train_labels[index])
        flipped = rf"yes \(true: {truth}\)" if result.is_wrong[index] else "no"
        label = int(result.given_labels[index])
        assert re.search(rf"^opponent +#{index} +{label} +-\S+ +{flipped}$", text, re.MULTILINE)
    listed = torch.cat([result.explained.proponents.indices, result.explained.opponents.indices])
    assert f"{int(result.is_wrong[listed].sum())} of these 12 have a flipped label" in text
    assert f"Accuracy on the test images: {result.test_accuracy:.1%}" in text
    assert "positive: a proponent; training on it lowered the loss" in text
    assert "1438 training and 359 test images" in text
    assert "144 of the training labels (10%)" in text


def test_the_page_has_what_was_computed(ran):
    result = ran[0]
    page = result.files[-1].read_text(encoding="utf-8")
    assert "<h1>Handwritten digits, 10% of them with a wrong label</h1>" in page
    assert "<dd>TracInCP</dd>" in page
    explained = result.explained
    for row, (reason, place) in enumerate(explained.places.items()):
        assert f"<h3>Test image #{place}, the {reason}</h3>" in page
        assert f"<dd>{int(result.digits.test_labels[place])}</dd>" in page
        guess, sure = explained.predictions[row].split(", ")
        assert explained.titles[row].splitlines()[1:] == [f"predicted {guess}", sure]
        assert f"<dd>{guess}, {sure}</dd>" in page
    for index in explained.proponents.indices.flatten().tolist():
        assert f'alt="training example #{index}"' in page
    assert "<caption>the 24 highest of 1438 scores</caption>" in page
    assert f"<figcaption>{report.verdict(result.detections)}</figcaption>" in page


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.99, 0.98, 0.97), "Self-influence is best here"),
        ((0.98, 0.98, 0.97), "Self-influence is among the best here"),
        ((0.97, 0.98, 0.99), "Self-influence is not the best here"),
    ],
)
def test_the_verdict_is_that_of_the_numbers(ran, values, verdict):
    names = ran[0].detections
    made_up = {
        name: demo.Detection(torch.zeros(1), value, value)
        for name, value in zip(names, values, strict=True)
    }
    assert verdict in report.detection_text(made_up)


def test_the_callers_state_is_left_alone(ran):
    before, after = ran[3]
    assert before == after


def test_a_second_run_gives_the_same(ran, tmp_path):
    images, labels = ran[0].digits.train_images, ran[0].given_labels
    with demo.one_thread():
        torch.rand(7)
        _, files = demo.train_network(images, labels, tmp_path, SMALL)
    states = [torch.load(path[-1], weights_only=True) for path in (files, ran[0].files[:3])]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_digits_are_split_without_overlap():
    digits = demo.load_digits_split()
    assert digits.train_images.shape == (1438, 1, 8, 8)
    assert digits.test_images.shape == (359, 1, 8, 8)
    assert digits.train_images.aminmax() == (0, 1)
    everything = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797
    other = demo.load_digits_split(seed=1)
    assert not torch.equal(digits.test_labels, other.test_labels)


def test_flipped_labels_are_wrong_and_the_others_right():
    labels = torch.arange(200) % 10
    given, is_wrong = demo.flip_labels(labels, share=0.25)
    assert int(is_wrong.sum()) == 50
    assert torch.equal(given != labels, is_wrong)
    assert set(given.tolist()) == set(range(10))
    assert torch.equal(given, demo.flip_labels(labels, share=0.25)[0])
    assert torch.equal(demo.flip_labels(labels, share=0)[0], labels)


def test_three_informative_test_images_are_chosen():
    probabilities = torch.tensor([[0.9, 0.1], [0.99, 0.01], [0.2, 0.8], [0.4, 0.6], [0.55, 0.45]])
    chosen = demo.choose_tests(probabilities, torch.tensor([0, 0, 0, 0, 0]))
    assert chosen == {"surest right one": 1, "surest wrong one": 2, "least sure one": 4}
    chosen = demo.choose_tests(probabilities, torch.tensor([0, 0, 1, 1, 0]))
    assert chosen == {"surest right one": 1, "least sure one": 4}


def test_wrong_settings_are_refused():
    digits = demo.load_digits_split()
    data = digits.train_images, digits.train_labels
    with pytest.raises(InvalidArgumentError, match="got 5 checkpoints in 2 epochs; there must be"):
        demo.train_network(*data, settings=demo.Settings(epochs=2))
    with pytest.raises(InvalidArgumentError, match=r"`share` of labels to flip is 1\.5; it must"):
        demo.flip_labels(digits.train_labels, share=1.5)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[demo\]'"):
        demo.load_digits_split()
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    assert "pip install '.[demo]'" in capsys.readouterr().err


def test_a_file_as_output_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidArgumentError, match="file' is a file; pass a folder"):
        demo.run(file)
    assert main(["demo", "--output", str(file)]) == 1
    assert "is a file; pass a folder to write to" in capsys.readouterr().err


def test_the_command_line_runs_the_demo(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        demo, "run", lambda output, **options: calls.append(output) or options["say"]("hello")
    )
    assert main(["demo"]) == 0
    assert [str(output) for output in calls] == ["influence_kit_demo"]
    assert capsys.readouterr().out == "hello\n\n"


def test_inspect_prints_the_table_of_a_folder_or_files(ran, capsys):
    result, _, folder, _ = ran
    files = [str(path) for path in result.files[:3]]
    expected = f"{checkpoint_table(files)}\n"
    for arguments in ([str(folder / "checkpoints")], [str(folder / "checkpoints/*.pt")], files):
        assert main(["inspect", *arguments]) == 0
        assert capsys.readouterr().out == expected
    assert main(["inspect", files[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.split("  +", lines[1]) == [
        files[0],
        "2",
        "0.25",
        "stored",
        "stored as 'learning_rate'",
    ]


def test_inspect_of_nothing_is_an_error(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "missing")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "There is no such folder or file" in captured.err
    assert captured.err.startswith("python -m influence_kit inspect: ")


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["other"]])
def test_wrong_commands_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m influence_kit" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "list checkpoints with step and learning rate" in capsys.readouterr().out
