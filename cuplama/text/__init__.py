"""Text on both ends of a model: tokenizer, detokenizer, stop strings, chat template."""
