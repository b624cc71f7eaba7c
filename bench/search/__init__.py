"""`bench search`: the settings of a suite's methods, sought on validation prompts with one budget for all of them.

grids: what is tried, and whether every method is given as much. queue: the trials, kept by Optuna, each done once
however many workers there are. trials: how one is done. choice: what was found. search: the way through all of it.
"""
