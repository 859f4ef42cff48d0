"""The web page in a real browser: what somebody does there, and what a hostile model cannot do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cuplama
from cuplama.model import Model
from cuplama.sampling_params import SamplingParams
from cuplama.server.service import Service
from tests.server.page.browser import Keys, Page, needs_chromium
from tests.server.page.scripted import Script
from tests.server.running import eventually, in_thread

pytestmark = [needs_chromium, pytest.mark.slow]
WORDS = [f"word{i} " for i in range(200)]


def test_an_answer_is_shown_as_it_comes_and_found_again(page: Page, script: Script) -> None:
    script.pieces, script.pause = WORDS[:60], 0.02
    page.send("Hello")
    eventually(lambda: len(page.texts(".assistant .body")[0].split()) > 3)
    assert len(page.texts(".assistant .body")[0].split()) < 60, "it was not shown piece by piece"
    assert re.match(r"\d+ tokens, [\d.]+ tokens/s", page[".assistant .stats"].text), "no figures while it grows"
    assert page.answered().split() == "".join(WORDS[:60]).split()
    assert page["#prompt"].get_property("value") == ""
    assert "60 tokens" in page[".assistant .stats"].text
    assert "prompt of 7" in page[".assistant .stats"].text
    assert page["#used"].text == "67 of 1,024 tokens of context"
    assert "The answer is complete. word0" in page.texts("#status")[0]
    (asked,) = script.asked
    assert asked == {
        "model": "stories-7m",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "messages": [{"role": "user", "content": "Hello"}],
    }
    page.load().ready()
    assert page.texts(".body") == ["Hello", "".join(WORDS[:60]).strip()]
    assert page["#title"].text == "Hello"
    assert "60 tokens" in page[".assistant .stats"].text


def test_the_conversation_so_far_is_sent(page: Page, script: Script) -> None:
    page.send("One")
    page.answered()
    page.send("Two")
    page.answered(2)
    said = [(m["role"], m["content"]) for m in script.asked[1]["messages"]]
    assert said == [("user", "One"), ("assistant", "An answer."), ("user", "Two")]


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_keeps_what_has_come(page: Page, script: Script, by: str) -> None:
    script.pieces, script.pause = WORDS, 0.02
    page.send("Hello")
    eventually(lambda: "word3" in page.texts(".assistant .body")[0])
    page["#stop"].click() if by == "button" else page.keys(Keys.ESCAPE)
    text = page.answered()
    assert text.startswith("word0 word1")
    assert "word199" not in text
    assert "Stopped." in page.texts(".note")
    assert "tokens/s" in page[".assistant .stats"].text
    eventually(lambda: script.closed == 1)
    assert page.focus() == "prompt"


def test_an_answer_that_was_cut_off_goes_on(page: Page, script: Script) -> None:
    script.pieces, script.pause = WORDS, 0.02
    page.send("Hello")
    eventually(lambda: "word3" in page.texts(".assistant .body")[0])
    page["#stop"].click()
    page.answered()
    begun = page.stored()[0]["messages"][1]["content"]
    script.pieces, script.pause = ("and ", "on"), 0.0
    page.press("Continue")
    eventually(lambda: len(script.asked) == 2)
    assert page.answered() == f"{begun}and on"
    asked = script.asked[1]
    assert asked["messages"][-1] == {"role": "assistant", "content": begun}
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    assert "continue_final_message" not in script.asked[0]


def test_two_conversations_are_answered_at_once(page: Page, script: Script) -> None:
    script.pieces, script.pause = WORDS[:150], 0.02
    page.send("First")
    eventually(lambda: page.texts(".assistant .body") != [""])
    page["#new"].click()
    assert not page["#stop"].is_displayed()
    script.pieces, script.pause = ("Short.",), 0.0
    page.send("Second")
    assert page.answered() == "Short."
    page.all("#conversations .open")[1].click()
    assert page.texts(".user .body") == ["First"]
    assert page["#stop"].is_displayed()
    assert page.answered().split() == "".join(WORDS[:150]).split()


def test_what_an_edit_replaced_can_be_brought_back(page: Page, script: Script) -> None:
    page.send("One")
    page.answered()
    page.send("Two")
    page.answered(2)
    script.pieces, script.pause = WORDS, 0.02
    page["#messages .assistant .changes:nth-child(3)"].click()
    eventually(lambda: len(page.texts(".body")) == 2)
    page.press("Undo")
    assert page.texts(".body") == ["One", "An answer.", "Two", "An answer."]
    eventually(lambda: script.closed == 1)
    eventually(lambda: not page["#stop"].is_displayed())
    page.load().ready()
    assert page.texts(".body") == ["One", "An answer.", "Two", "An answer."]


def test_a_full_storage_is_told(page: Page) -> None:
    page.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page.send("Hello")
    assert page.answered() == "An answer."
    assert "Export and delete some" in page["#toast"].text


def test_without_storage_the_page_still_answers(page: Page, script: Script) -> None:
    script.key = "secret"
    off = "{ get() { throw new DOMException('off', 'SecurityError') } }"
    source = f"for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {off})"
    added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page.load()
        eventually(lambda: page["#key-dialog"].is_displayed())
        page["#key"].send_keys("secret", Keys.ENTER)
        page.ready()
        page.send("Hello")
        assert page.answered() == "An answer."
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_another_tab_s_conversations_appear(page: Page) -> None:
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.load().ready()
    page.send("From another tab")
    page.answered()
    page.driver.close()
    page.driver.switch_to.window(first)
    eventually(lambda: page.texts("#conversations .open") == ["From another tab"])


def test_closing_the_page_keeps_what_has_come(page: Page, script: Script) -> None:
    script.pieces, script.pause = WORDS, 0.02
    page.send("Hello")
    eventually(lambda: "word0" in str(page.stored()))
    page.load().ready()
    assert page.texts(".assistant .body")[0].startswith("word0")
    assert page.texts(".note") == ["Stopped."]


def test_regenerate_edit_and_delete(page: Page, script: Script) -> None:
    page.send("One")
    page.answered()
    script.pieces = ("Another answer.",)
    page.press("Regenerate")
    eventually(lambda: page.texts(".assistant .body") == ["Another answer."])
    page.answered()
    page.send("Two")
    page.answered(2)
    # An edited question drops what followed it.
    page["#messages .user .changes"].click()
    assert page[".editor textarea"].get_property("value") == "One"
    page[".editor textarea"].send_keys(Keys.END, "!", Keys.ENTER)
    eventually(lambda: len(script.asked) == 4)
    assert script.asked[3]["messages"] == [{"role": "user", "content": "One!"}]
    page.answered()
    assert page.texts(".user .body") == ["One!"]
    # An edited answer stays where it is.
    page.press("Edit", ".assistant")
    page[".editor textarea"].send_keys(Keys.END, " Yes.")
    page.press("Save")
    assert page.texts(".body") == ["One!", "Another answer. Yes."]
    page.press("Delete", ".user")
    assert not page.all(".message")
    page.press("Undo")
    assert page.texts(".body") == ["One!", "Another answer. Yes."]
    page.press("Delete", ".assistant")
    assert page.texts(".body") == ["One!"]
    assert len(script.asked) == 4


def test_a_cancelled_edit_changes_nothing(page: Page, script: Script) -> None:
    page.send("One")
    page.answered()
    page["#messages .user .changes"].click()
    page[".editor textarea"].send_keys("nonsense", Keys.ESCAPE)
    assert page.texts(".body") == ["One", "An answer."]
    assert page.focus() == "Edit"
    assert len(script.asked) == 1


def test_a_model_without_a_template_goes_on_with_a_text(page: Page, script: Script) -> None:
    script.template, script.pieces = False, (", there was", " a dog")
    page.load(fresh=True).ready()
    page.press("Once upon a time")
    assert page.answered() == ", there was a dog"
    page.send("It barked.")
    page.answered(2)
    page["#send"].click()
    page.answered(3)
    begun = "Once upon a time, there was a dog"
    prompts = [(asked["prompt"], asked["max_tokens"]) for asked in script.asked]
    more = f"{begun} It barked."
    assert prompts == [("Once upon a time", 256), (more, 256), (f"{more}, there was a dog", 256)]
    page.press("Edit")
    assert page[".editor textarea"].get_property("value") == f"{more}, there was a dog, there was a dog"
    page[".editor textarea"].clear()
    page[".editor textarea"].send_keys("A cat")
    page.press("Send")
    page.answered()
    assert page.texts(".body") == ["A cat", ", there was a dog"]


def test_system_prompt_and_settings_are_sent_and_kept(page: Page, script: Script) -> None:
    page["#tune"].click()
    page["#system"].send_keys("Be brief.")
    page["#setting-temperature"].send_keys("0.5")
    page["#setting-seed"].send_keys("7")
    page["#setting-top_p"].send_keys("3")
    page["#setting-top_k"].send_keys("1.5")
    invalid = page.js("return [...document.querySelectorAll('[aria-invalid=true]')].map((e) => e.id)")
    assert invalid == ["setting-top_p", "setting-top_k"]
    page.send("Hello")
    page.answered()
    (asked,) = script.asked
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {k: asked.get(k) for k in ("temperature", "seed", "top_p", "top_k")} == {
        "temperature": 0.5,
        "seed": 7,
        "top_p": None,
        "top_k": None,
    }
    page.load().ready()
    assert page["#setting-temperature"].get_property("value") == "0.5"
    assert page["#system"].get_property("value") == "Be brief."
    page["#tune"].click()
    page["#reset"].click()
    page.send("Again")
    page.answered(2)
    assert "temperature" not in script.asked[1]


def test_reasoning_is_folded(page: Page, script: Script) -> None:
    script.reasoning, script.pieces = ("Let me ", "think."), ("So it is.",)
    page.send("Why?")
    assert page.answered() == "So it is."
    assert page["details"].get_attribute("open") is None
    assert page["summary"].text.startswith("Reasoned for")
    assert page.texts("details .plain") == ["Let me think."]
    page.send("And?")
    page.answered(2)
    assert "think" not in json.dumps(script.asked[1])


@pytest.mark.parametrize(
    ("status", "code", "headers", "words"),
    [
        (429, None, {"Retry-After": "3"}, "The server is busy: too many requests are waiting. Try again in 3 s."),
        (400, "context_length_exceeded", {}, "This is longer than the model can read."),
        (400, None, {}, "The server refused this request."),
        (500, None, {}, "The server failed on this request."),
    ],
)
def test_errors_are_told_and_mended(
    page: Page, script: Script, status: int, code: str | None, headers: dict[str, str], words: str
) -> None:
    script.refusal = status, {"error": {"message": "top_p = 3 is <b>wrong</b>", "code": code}}, headers
    page.send("Hello")
    eventually(lambda: page.all(".error"))
    assert page[".error"].text.startswith(words)
    assert "top_p = 3 is <b>wrong</b>" in page[".error"].text
    script.refusal = None
    page.press("Try again")
    assert page.answered() == "An answer."
    assert not page.all(".error")


def test_a_broken_connection_keeps_what_has_come(page: Page, script: Script) -> None:
    script.breaks = True
    page.send("Hello")
    assert page.answered() == "An answer."
    assert page[".error p"].text == "The connection ended before the answer was complete."
    script.breaks, script.fault = False, "the logits are not finite"
    page.press("Try again")
    eventually(lambda: page.texts(".error p") == ["The server failed on this request.", "the logits are not finite"])
    script.fault = ""
    page.press("Try again")
    eventually(lambda: not page.all(".error"))
    assert page.answered() == "An answer."


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page, script: Script) -> None:
    script.key = "secret"
    page.load(fresh=True)
    eventually(lambda: page["#key-dialog"].is_displayed())
    page["#key"].send_keys("wrong", Keys.ENTER)
    eventually(lambda: page["#key-words"].text == "The server did not take this key.")
    page["#key"].send_keys("secret", Keys.ENTER)
    page.ready().send("Hello")
    assert page.answered() == "An answer."
    page.load().ready()
    assert not page["#key-dialog"].is_displayed()
    assert "secret" not in page.js("return JSON.stringify(localStorage)")


def test_without_a_key_the_page_says_so(page: Page, script: Script) -> None:
    script.key = "secret"
    page.load(fresh=True)
    eventually(lambda: page["#key-dialog"].is_displayed())
    page.press("Cancel")
    eventually(lambda: page["#state-text"].text == "The server wants an API key.")
    page.press("Try again")
    eventually(lambda: page["#key-dialog"].is_displayed())
    page.press("Cancel")


def test_a_server_that_loads_is_waited_for(page: Page, script: Script) -> None:
    script.loading = True
    page.load(fresh=True)
    eventually(lambda: "being loaded" in page["#state"].text)
    page.send("Hello")
    assert not page["#send"].is_enabled()
    assert page["#prompt"].get_property("value") == "Hello"
    script.loading = False
    page.ready()
    assert not page["#state"].is_displayed()
    page["#send"].click()
    assert page.answered() == "An answer."


def test_light_and_dark(page: Page) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(ground)
    page.colours("dark")
    dark = page.js(ground)
    assert sum(map(int, light[4:-1].split(","))) > 700 > 150 > sum(map(int, dark[4:-1].split(",")))
    page.choose("#theme", "Light")
    assert page.js(ground) == light
    page.load().ready()
    assert page.js(ground) == light
    page.colours("light")
    page.choose("#theme", "Dark")
    assert page.js(ground) == dark
    page.choose("#theme", "System")
    assert page.js(ground) == light


def test_a_phone_never_scrolls_sideways(page: Page, script: Script) -> None:
    wide = "x" * 500
    script.pieces = (
        f"{wide}\n\n| {wide} | b |\n|---|---|\n| c | d |\n\n```{wide}\n{wide}\n```\n\nhttps://a.b/{wide} `{wide}`",
    )
    page.size(375, 700)
    page.load(fresh=True).ready()
    fits = "return [document.documentElement.scrollWidth, document.getElementById('thread').scrollWidth]"
    page.send(wide)
    page.answered()
    assert max(page.js(fits)) <= 375
    assert not page["#sidebar"].is_displayed()
    page["#menu"].click()
    assert page["#sidebar"].is_displayed()
    assert max(page.js(fits)) <= 375
    page.keys(Keys.ESCAPE)
    assert not page["#sidebar"].is_displayed()
    assert page.focus() == "menu"
    page["#tune"].click()
    assert max(page.js(fits)) <= 375
    page.js("document.getElementById('scrim').click()")
    assert not page["#settings"].is_displayed()


def test_the_keyboard_alone_will_do(page: Page, script: Script) -> None:
    assert page.focus() == "prompt"
    page.keys("Hello")
    page.keys(Keys.SHIFT, Keys.ENTER)
    page.keys("world")
    assert not script.asked
    page.keys(Keys.ENTER)
    page.answered()
    assert script.asked[0]["messages"][0]["content"] == "Hello\nworld"
    page.keys(Keys.CONTROL, Keys.SHIFT, "o")
    assert not page.all(".message")
    assert page.focus() == "prompt"
    seen = []
    for _ in range(14):
        page.keys(Keys.TAB)
        seen.append(page.focus())
        outline = page.js("const s = getComputedStyle(document.activeElement); return s.outlineStyle")
        assert outline != "none" or seen[-1] == "prompt" or page.js("return document.activeElement === document.body")
    assert {"new", "import", "export", "theme", "menu", "tune", "thread", "Rename", "Delete"} <= {
        *seen,
        *(s[:6] for s in seen),
    }
    assert "setting-seed" not in seen, "a closed panel takes the focus"


def test_conversations_are_listed_renamed_deleted(page: Page) -> None:
    page.send("First")
    page.answered()
    page["#new"].click()
    page.send("Second")
    page.answered()
    titles = "#conversations .open"
    assert page.texts(titles) == ["Second", "First"]
    page.all(titles)[1].click()
    assert page.texts(".user .body") == ["First"]
    page.press("Rename")
    page["#conversations input"].send_keys(Keys.CONTROL, "a")
    page["#conversations input"].send_keys("Renamed", Keys.ENTER)
    assert page.texts(titles) == ["Second", "Renamed"]
    page.send("More")
    page.answered(2)
    assert page.texts(titles) == ["Renamed", "Second"]
    page.press("Delete", "#sidebar")
    assert page.texts(titles) == ["Second"]
    assert len(page.stored()) == 1
    page.press("Undo")
    assert page.texts(titles) == ["Renamed", "Second"]
    assert len(page.texts(".message")) == 4


def test_export_and_import(page: Page, downloads: Path) -> None:
    page.send("First")
    page.answered()
    stored = page.stored()
    page["#export"].click()
    eventually(lambda: list(downloads.glob("*.json")))
    (file,) = downloads.glob("*.json")
    assert json.loads(file.read_text())["conversations"] == stored
    page.load(fresh=True).ready()
    assert not page.texts("#conversations .open")
    page["#file"].send_keys(str(file))
    eventually(lambda: page.texts("#conversations .open") == ["First"])
    assert page.stored() == stored
    file.write_text(
        '{"format": "cuplama-conversations", "conversations": [{"id": 3}, null, {"id": "<b>", "messages": 1}]}'
    )
    page["#file"].send_keys(str(file))
    eventually(lambda: "0 conversations" in page["#toast"].text)
    file.write_text("[]")
    page["#file"].send_keys(str(file))
    eventually(lambda: "not a file of conversations" in page["#toast"].text)
    assert page.stored() == stored


def test_code_is_copied(page: Page, script: Script) -> None:
    script.pieces = ("```python\nif x:\n    y = '<b>'\n```",)
    page.send("Code")
    page.answered()
    for name in ("clipboard-read", "clipboard-write"):
        permission = {"permission": {"name": name}, "setting": "granted", "origin": script.url.rstrip("/")}
        page.driver.execute_cdp_cmd("Browser.setPermission", permission)
    page[".code button"].click()
    eventually(lambda: page[".code button"].text == "Copied")
    assert page.js_async("return await navigator.clipboard.readText()") == "if x:\n    y = '<b>'"


def test_the_page_follows_an_answer_unless_somebody_scrolls_up(page: Page, script: Script) -> None:
    script.pieces, script.pause = [f"line {i}\n\n" for i in range(120)], 0.01
    page.size(800, 500)
    page.send("Long")
    gap = "const t = document.getElementById('thread'); return t.scrollHeight - t.scrollTop - t.clientHeight"
    eventually(lambda: "line 60" in page.texts(".assistant .body")[0])
    assert page.js(gap) < 60
    page.js("document.getElementById('thread').scrollTop = 0")
    page.answered()
    assert page.js(gap) > 500


def test_the_bundled_model_tells_a_story(page: Page) -> None:
    """The real server, which says that its model has no chat template."""
    with cuplama.load(device="numpy") as model, in_thread(Service(["stories-7m"], model)) as url:
        page.url = url
        page.load(fresh=True).ready()
        page["#tune"].click()
        page["#setting-temperature"].send_keys("0")
        page["#setting-max_tokens"].send_keys("24")
        page.send("Once upon a time")
        expected = model.generate("Once upon a time", temperature=0, max_tokens=24).text
        assert page.answered() == expected
        assert "24 tokens" in page[".assistant .stats"].text


def test_every_setting_is_one_that_the_server_takes(page: Page, service: Service, model: Model) -> None:
    """A chat with the real server, whose model has a template here."""
    with in_thread(service) as url:
        page.url = url
        page.load(fresh=True).ready()
        page["#tune"].click()
        values = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "12", "seed": "3"}
        penalties = {"repetition_penalty": "1.1", "presence_penalty": "0.1", "frequency_penalty": "0.1"}
        for name, value in (values | penalties).items():
            page[f"#setting-{name}"].send_keys(value)
        assert len(page.all("#fields input")) == len(values | penalties)
        page["#system"].send_keys("Tell stories.")
        page.send("A dog!")
        page.answered()
        messages = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "A dog!"}]
        params = SamplingParams.from_dict({name: json.loads(value) for name, value in (values | penalties).items()})
        assert page.stored()[0]["messages"][1]["content"] == model.chat(messages, params).text
