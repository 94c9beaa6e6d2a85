"""From what `fit` is given to the batch of a step."""
