"""Colours of the figures; where one has a meaning, a word or a sign always says the same."""

# two colours that stay apart for colour-blind eyes
BLUE, ORANGE = "#1b6ca8", "#c8501e"
POSITIVE, NEGATIVE = BLUE, ORANGE
RIGHT, WRONG = BLUE, ORANGE
NEUTRAL, GREY = "#333333", "#777777"
# from negative over white to positive
SIGNED = "RdBu"
