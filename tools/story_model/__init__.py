"""The story model of `weights/`: its texts, tokenizer and runs. `tools.train_story_model` puts them together."""
