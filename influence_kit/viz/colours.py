"""Colours of the figures; wherever a colour has a meaning, a word or a sign has the same."""

# two colours that colour-blind readers can distinguish
BLUE, ORANGE = "#1b6ca8", "#c8501e"
POSITIVE, NEGATIVE = BLUE, ORANGE
RIGHT, WRONG = BLUE, ORANGE
NEUTRAL, GREY = "#333333", "#777777"
# from negative over white to positive
SIGNED = "RdBu"
