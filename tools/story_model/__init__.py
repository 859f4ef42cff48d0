"""The story model of `weights/`: its text, network, training and export. `tools.train_story_model` runs it."""
