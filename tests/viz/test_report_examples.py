"""How the page of results shows an example: images by their pixels, rows by name, texts."""

import numpy as np
import pytest
import torch
from pages import Page

from influence_kit import KMostInfluentialResults
from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import Report

RESULT = KMostInfluentialResults(torch.tensor([[0]]), torch.ones(1, 1))


def shown(example, **options):
    """The page of one training example with a score of 1, asked for by an empty text."""
    return Page(Report("Title", [example], **options).explain(["query"], RESULT).html())


def test_images_of_one_channel_go_from_their_lowest_to_their_highest_value():
    image = torch.tensor([[-1.0, 0.0, 1.0], [3.0, 1.0, -1.0]])
    expected = np.array([[0, 64, 128], [255, 128, 0]])[..., None].repeat(3, axis=2)
    for example in (image, image[None], image.numpy().astype(np.float64), image.tolist()):
        page = shown(example)
        np.testing.assert_array_equal(page.pixels()[0], expected)
    assert page.tables[0][0] == ["image", "index", "score"]
    assert page.attributes("img") == [
        {
            "src": page.attributes("img")[0]["src"],
            "alt": "training example #0",
            "class": "enlarged",
        }
    ]
    np.testing.assert_array_equal(shown(image, cmap="gray_r").pixels()[0], 255 - expected)


def test_colours_are_embedded_as_they_are():
    colours = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    expected = colours.permute(1, 2, 0).numpy()
    for example in (colours.to(torch.uint8), colours.double() / 255, colours.float() / 255):
        np.testing.assert_array_equal(shown(example).pixels()[0], expected)


def test_large_images_are_shrunk_by_means():
    colours = torch.randint(0, 256, (3, 192, 96), generator=torch.Generator().manual_seed(0))
    report = Report("Title", [colours / 255])
    page = Page(report.explain(colours[None] / 255, RESULT).html())
    query, small = page.pixels()
    np.testing.assert_array_equal(query, colours.permute(1, 2, 0))
    blocks = colours.double().view(3, 96, 2, 48, 2).mean((2, 4)).permute(1, 2, 0)
    np.testing.assert_array_equal(small, blocks.round())
    assert all("class" not in image for image in page.attributes("img"))
    assert page.attributes("img")[0]["alt"] == "Test example #0"
    assert shown(torch.rand(1, 1000)).pixels()[0].shape == (1, 96, 3)


def test_rows_have_the_names_of_their_features():
    def numbers(example, **options):
        page = shown(example, **options)
        texts = page.texts("dl", **{"class": "numbers"})[0].split("\n")
        rest = page.texts("p", **{"class": "rest"})
        return [text for text in texts if text], rest

    row = torch.tensor([0.25, -1234567.0, 3.0])
    named = numbers(row, feature_names=["age ", "height ", "c "])
    assert named == (["age 0.25", "height -1.235e+06", "c 3"], [])
    assert numbers([50256, 7]) == (["050256", "17"], [])
    assert numbers(2.5) == (["02.5"], [])
    values, rest = numbers(torch.arange(45))
    assert values == [f"{i}{i}" for i in range(40)]
    assert rest == ["... and 5 more numbers"]


def test_long_texts_are_cut_where_it_is_said():
    page = shown("a word " * 10, letters=6)
    assert page.tables[0][2] == ["a word ... and 64 more characters"]
    assert shown("a word", letters=6).tables[0][2] == ["a word"]


def test_other_numbers_than_feature_names_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"has 2 numbers, and there are 1 feature_names"):
        shown(torch.zeros(2), feature_names=["a"])
