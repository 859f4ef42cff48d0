"""The text forms in which models call tools, as data, and the readers of their bodies; ``splitter`` puts them to work.

A family trains its models to write a call in a form of its own. Here a form is a row of the table in ``formats``: start
tags, end tag, and the kind of body between them. Which one a model writes is told by its chat template and its
tokens, never by its name.
"""
