"""Training: a model's own node list with its gradients, and everything from files of text to a saved model."""
