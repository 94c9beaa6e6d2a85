"""Private training: the model, what it plans, pays and keeps, and the step of each backend."""
