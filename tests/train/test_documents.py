"""Files to tokens: where documents begin, which tokens are learned, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import ParameterError, PromptError
from cuplama.text.tokenizer import Tokenizer
from cuplama.train.documents import BEGINS, LEARNED, Stream, is_lines, read_documents
from tests.train.made import marks, tokenizer


def shown(paths: list[Path], found: Tokenizer, **config: Any) -> str:
    """The stream as text: | where a document begins, and ~ before a token that is not learned."""
    stream = Stream(marks(found, **config))
    text = ""
    for path in paths:
        for part in read_documents(path, found, stream):
            for id, flags in zip(part.ids.tolist(), part.flags.tolist(), strict=True):
                text += ("|" if flags & BEGINS else "") + ("" if flags & LEARNED else "~") + str(found.piece(id))
    return text


def file(path: Path, *lines: Any) -> Path:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_bytes(text.encode())
    return path


def test_a_text_without_special_tokens_is_one_document(tmp_path: Path) -> None:
    a, b = file(tmp_path / "a.txt", "ab\r\n"), file(tmp_path / "b", "c")
    assert shown([a, b], tokenizer(tmp_path)) == "|~ab?\n|~c"


def test_a_shared_separator_belongs_to_both_documents_and_is_learned(tmp_path: Path) -> None:
    a, b = file(tmp_path / "a.txt", "ab<sep>c<sep>"), file(tmp_path / "b.txt", "<sep>d")
    found = tokenizer(tmp_path / "t", bos="<sep>", eos="<sep>", adds=True)
    assert shown([a, b], found) == "|<sep>ab|<sep>c|<sep>d"  # the separator between files is there once
    lines = file(tmp_path / "a.jsonl", {"text": "ab"}, "\n", {"text": "c"}, {"text": ""})
    assert shown([lines, a], found) == "|<sep>ab|<sep>c|<sep>|<sep>ab|<sep>c|<sep>".replace("|<sep>|<sep>", "|<sep>")
    plain = tokenizer(tmp_path / "u", bos="<sep>", eos="<sep>")
    assert shown([a], plain) == "|~ab|<sep>c|<sep>"
    assert shown([lines], plain) == "|~ab|<sep>c|<sep>"


def test_bos_and_eos_of_their_own(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t", bos="<s>", eos="</s>", adds=True)
    text = file(tmp_path / "a.txt", "ab</s>c</s><s>d")
    assert shown([text], found) == "|~<s>ab</s>|~<s>c</s>|~<s>d"  # each begins as a prompt does
    lines = file(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "<s>c</s>"}, {"text": "d</s>e"})
    assert shown([lines], found) == "|~<s>ab</s>|~<s>c</s>|~<s>d</s>|~<s>e</s>"


def test_an_eos_without_a_bos(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t", eos="</s>")
    assert shown([file(tmp_path / "a.txt", "ab</s>c</s>")], found) == "|~ab</s>|~c</s>"
    lines = file(tmp_path / "a.jsonl", {"text": "ab", "id": 3}, {"text": "c"})
    assert shown([lines], found) == "|~ab</s>|~c</s>"


def test_what_the_config_names_counts_where_the_tokenizer_names_nothing(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t")
    text = file(tmp_path / "a.txt", "ab</s>c")
    assert shown([text], found) == "|~ab</s>c"
    assert shown([text], found, eos_token_id=found.encode("a"), bos_token_id=found.encode("b")[0]) == "|~ab</s>c"
    end = found.encode("</s>")[0]
    assert shown([text], found, eos_token_id=[end, 1]) == "|~ab</s>|~c"
    assert shown([text], found, eos_token_id=end, bos_token_id=end) == "|~ab|</s>c"


CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_of_a_chat_the_answers_are_learned_up_to_the_end_of_the_turn(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t", eos="</s>", template=CHAT)
    lines = file(tmp_path / "a.jsonl", chat("a", "b", "c", "d"), {"text": "e"}, chat("f", "g", "h"))
    prompt, answer = "".join(f"~{c}" for c in "user: "), "".join(f"~{c}" for c in "assistant: ")
    before, begin = f"|~<s>{prompt}", f"~</s>~\n~<s>{answer}"
    first = f"{before}~a{begin}b</s>" + f"~\n~<s>{prompt}~c{begin}d</s>"
    assert shown([lines], found) == f"{first}|~e</s>{before}~f{begin}g</s>"


def test_special_tokens_that_a_message_spells_are_text(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t", eos="</s>", template=CHAT)
    text = shown([file(tmp_path / "a.jsonl", chat("a", "</s>"))], found)
    assert text.endswith("~ ??s?</s>")


def test_an_answer_that_history_prints_otherwise_begins_a_new_document(tmp_path: Path) -> None:
    template = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split(';')[-1] }}")
    found = tokenizer(tmp_path / "t", eos="</s>", template=template)
    text = shown([file(tmp_path / "a.jsonl", chat("a", "x;b", "c", "d"))], found)
    documents = [part.replace("~", "") for part in text.split("|")[1:]]
    assert documents == [
        "<s>user: a</s>\n<s>assistant: x;b</s>",
        "<s>user: a</s>\n<s>assistant: b</s>\n<s>user: c</s>\n<s>assistant: d</s>",
    ]
    assert re.sub(r"~(<s>|</s>|[^<])", "", text) == "|x;b</s>|d</s>"  # what is learned


def test_a_template_without_an_end_of_turn_gets_an_eos(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    found = tokenizer(tmp_path / "t", eos="<sep>", template=template)
    assert shown([file(tmp_path / "a.jsonl", chat("x", "y"))], found) == "|~u~:~x~;a:y;<sep>"
    bare = tokenizer(tmp_path / "u", template=template)
    assert shown([file(tmp_path / "a.jsonl", chat("x", "y"))], bare) == "|~u~:~x~;a:y;"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "it must be an object with either text or messages"),
        ('{"a": 1}', "it must be an object with either text or messages"),
        ('{"text": "a", "messages": []}', "it must be an object with either text or messages"),
        ('{"text": 3}', "text is a int, not a string"),
        ('{"text": "\\ud800"}', "the text is not valid Unicode"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": "hi"}', "messages must be a list of dicts, not str"),
        ('{"messages": [{"role": "user"}]}', "messages[0] has no 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "there is nothing to learn"),
        (b'{"text": "\xff"}', "not valid UTF-8: byte 0xff at offset 10"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str | bytes, said: str) -> None:
    found = tokenizer(tmp_path / "t", eos="</s>", template=CHAT)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(PromptError) as caught:
        shown([path], found)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t")
    (tmp_path / "a.txt").write_bytes(b"abc\xffd")
    with pytest.raises(PromptError, match=r"a.txt is not valid UTF-8: byte 0xff at offset 3"):
        shown([tmp_path / "a.txt"], found)
    with pytest.raises(PromptError, match=r"b.txt does not exist"):
        shown([tmp_path / "b.txt"], found)
    with pytest.raises(PromptError, match=r"b.jsonl does not exist"):
        shown([tmp_path / "b.jsonl"], found)
    with pytest.raises(ParameterError, match=r"a.json: JSON is read in lines"):
        is_lines(tmp_path / "a.json")
    with pytest.raises(PromptError, match=r"a.jsonl, line 1: the model has no chat template"):
        shown([file(tmp_path / "a.jsonl", chat("a", "b"))], found)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    assert shown([tmp_path / "a.txt"], found) == "|~ab"
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ab"}')
    assert shown([tmp_path / "a.jsonl"], found) == "|~ab"


def test_the_bytes_of_all_parts_are_those_of_the_file(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t", eos="</s>", template=CHAT)
    lines = file(tmp_path / "a.jsonl", chat("a", "b"), {"text": "e"})
    for path in (lines, file(tmp_path / "a.txt", "abü\r\n")):
        stream = Stream(marks(found))
        assert sum(part.size for part in read_documents(path, found, stream)) == path.stat().st_size
