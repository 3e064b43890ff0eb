"""A training config, a model and the number of images → the config with every option decided, and the reasons.

No module imports torch, so that a command decides before it starts anything. `table` holds the recipes of the model
families' authors, `variants` finds the row of a model, and `resolve` applies it.
"""
