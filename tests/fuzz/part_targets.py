from fuzz.bad_input import Target

TARGETS: list[Target] = []
