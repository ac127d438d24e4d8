"""The learning rate that was applied in the step before a checkpoint was saved.

Schedulers and optimizers hold the learning rate of the *next* step. The applied one is found in
logs (``trainer_folder``), by evaluating the scheduler's closed form one step back
(``closed_forms``), or from the rates known at other steps (``interpolation``).
"""
