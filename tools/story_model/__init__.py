"""The story model of `weights/`: its texts, its tokenizer and its runs. `tools.train_story_model` puts them together."""
