"""What the tests of figures ask of every figure."""

import io


def is_drawable(figure):
    """A PNG file comes out, and a notebook shows it: it does not where there are no axes."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue().startswith(b"\x89PNG") and len(figure.axes) > 0


def overlapping(texts):
    """Pairs of texts of a figure that has been drawn whose boxes overlap."""
    boxes = [text.get_window_extent() for text in texts]
    return [
        (texts[i].get_text(), texts[j].get_text())
        for i in range(len(boxes))
        for j in range(i)
        if boxes[i].overlaps(boxes[j])
    ]
