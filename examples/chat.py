"""A conversation of two turns. ``model.chat`` does this with a model's own chat template; the bundled model has none.

The bundled model only tells stories, so this template turns the messages into one: what the user says is said by Tom,
what the assistant says by Lily, and the answer ends at Lily's closing quotation mark.
"""

from __future__ import annotations

import cuplama
from cuplama.text.chat_template import render

TEMPLATE = """Tom and Lily sat in the garden.
{%- for message in messages %}{{ " Tom said, " if message.role == "user" else " Lily said, " }}"{{ message.content }}"
{%- endfor %} Lily said, \""""
QUESTIONS = ("Do you want to play with my ball?", "Can my dog play too?")


def main() -> None:
    messages: list[dict[str, str]] = []
    with cuplama.load() as model:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            if model.tokenizer.chat_template is not None:
                answer = model.chat(messages, max_tokens=40, seed=1).text
            else:
                answer = model.generate(render(TEMPLATE, messages), max_tokens=40, seed=1, stop='"').text
            messages.append({"role": "assistant", "content": answer})
            print(f"> {question}\n{answer}")


if __name__ == "__main__":
    main()
