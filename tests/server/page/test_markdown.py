"""What a model writes becomes elements of the page: the right ones, and never one that runs or asks another machine."""

from __future__ import annotations

import json

import pytest

from tests.server.page.browser import Page, needs_chromium
from tests.server.page.scripted import Script
from tests.server.running import eventually

pytestmark = [needs_chromium, pytest.mark.slow]
ALLOWED = {
    *(
        "P",
        "BR",
        "HR",
        "EM",
        "STRONG",
        "DEL",
        "A",
        "CODE",
        "PRE",
        "DIV",
        "SPAN",
        "BUTTON",
        "UL",
        "OL",
        "LI",
        "BLOCKQUOTE",
    ),
    *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "H2", "H3", "H4", "H5", "H6"),
}
# Text -> the HTML that it becomes, without the attributes that every link and table has.
CASES = {
    "a *b* **c** ***d*** ~~e~~": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del></p>",
    "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
    "**a *b** c*": "<p><strong>a *b</strong> c*</p>",
    "`a` ``b`c`` `d": "<p><code>a</code> <code>b`c</code> `d</p>",
    "`*a*` \\*b\\*": "<p><code>*a*</code> *b*</p>",
    "one\ntwo": "<p>one<br>two</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "# a\n## b\n###### c\n#d": "<h2>a</h2><h3>b</h3><h6>c</h6><p>#d</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "- a\n- b\n  - c\n\n    d\n- e": "<ul><li>a</li><li>b<ul><li><p>c</p><p>d</p></li></ul></li><li>e</li></ul>",
    "3. a\n4. b\n\n5. c": '<ol start="3"><li>a</li><li>b</li><li>c</li></ol>',
    "1. **a**:\n   ```\n   x\n   ```\n2. b": '<ol start="1"><li><strong>a</strong>:[code:x]</li><li>b</li></ol>',
    "text:\n- a\n- b\nlazy\n\nend": "<p>text:</p><ul><li>a</li><li>b<br>lazy</li></ul><p>end</p>",
    "1984. A year\nwas it": '<ol start="1984"><li>A year<br>was it</li></ol>',
    "It was\n1984. A year": "<p>It was<br>1984. A year</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "|a|b|\n|-|:-:|\n|c\\|d|**e**|\n\nf": (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>c|d</td><td><strong>e</strong></td></tr></tbody></table><p>f</p>"
    ),
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "text\n| a | b |\n|--|-x": "<p>text<br>| a | b |<br>|--|-x</p>",  # a table until its last character came
    "```py\nif a:\n    b\n```\nc": "[code:if a:\n    b]<p>c</p>",
    "~~~\n```\n~~~": "[code:```]",
    "```\nnever closed": "[code:never closed]",
    "``` `` not a fence": "<p>``` `` not a fence</p>",
    "[a](https://b.c/d) <https://e.f>": '<p><a href="https://b.c/d">a</a> <a href="https://e.f/">https://e.f</a></p>',
    "(see https://a.b/c_(d)).": '<p>(see <a href="https://a.b/c_(d)">https://a.b/c_(d)</a>).</p>',
    "[*a* `]`](mailto:b@c.d)": "<p>[<em>a</em> <code>]</code>](mailto:b@c.d)</p>",
    "[m](mailto:b@c.d)": '<p><a href="mailto:b@c.d">m</a></p>',
    "![cat](https://a.b/c.png)": '<p><a href="https://a.b/c.png">cat</a></p>',
    "[a](/relative) [b](x) [c]": "<p>[a](/relative) [b](x) [c]</p>",
    "[a](javascript:alert(1))": "<p>[a](javascript:alert(1))</p>",
    "<b>no</b> &amp; <!-- -->": "<p>&lt;b&gt;no&lt;/b&gt; &amp;amp; &lt;!-- --&gt;</p>",
}
SHOW = """
const { Markdown } = await import("/page/markdown.js");
const html = (pieces) => {
  const root = document.createElement("div");
  const view = new Markdown(root);
  for (const piece of pieces) { view.append(piece); if (pieces.length > 1) view.paint(); }
  view.paint(true);
  return root;
};
const plain = (root) => {
  for (const block of root.querySelectorAll(".code")) block.replaceWith(`[code:${block.lastChild.textContent}]`);
  for (const table of root.querySelectorAll(".table")) table.replaceWith(...table.childNodes);
  for (const e of root.querySelectorAll("*"))
    for (const name of ["rel", "target", "title", "class", "tabindex"]) e.removeAttribute(name);
  return root.innerHTML;
};
"""
HOSTILE = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg onload=window.ran=1><script>window.ran = 1</script></svg>",
    "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe>",
    "<style>body { display: none }</style><base href='https://evil.example/'>",
    "[x](javascript:window.ran=1) [x](JaVaScRiPt:window.ran=1) [x](\tjavascript:window.ran=1)",
    "[x](data:text/html,<script>window.ran=1</script>) [x](vbscript:x) [x](blob:x) [x](file:///etc/passwd)",
    "<javascript:window.ran=1> <data:text/html,x>",
    "![x](javascript:window.ran=1) ![x](https://evil.example/leak.png)",
    '[x](https://a.b "onmouseover=window.ran=1") [x](https://a.b"onclick="window.ran=1)',
    "```html\n<script>window.ran = 1</script>\n```",
    '```"><img src=x onerror=window.ran=1>\ncode\n```',
    "| <img src=x onerror=window.ran=1> | b |\n|---|---|\n| <script>window.ran=1</script> | c |",
    "# <script>window.ran=1</script>\n> <script>window.ran=1</script>\n- <script>window.ran=1</script>",
    "````\n```\n~~~\n<script>window.ran = 1</script>\n",
    "&lt;script&gt;window.ran = 1&lt;/script&gt; &#106;avascript:x",
    "<a href='javascript:window.ran=1' id=prompt name=cookie>x</a><form action=https://evil.example>",
    "\u202e<script>window.ran=1</script>\x00\ufeff\u2028</p></div></main>",
    "{{constructor.constructor('window.ran=1')()}} ${window.ran=1}",
]
REPEATED = [
    *("*", "_a ", "**a ", "*a_", "~~", "[", "[a](", "![", "`", "`a ``b ", "<", "<http://", "http://a", "((", "\\"),
    *("> ", ">", "- ", "-", "  - a\n", "- \n\n", "1. a\n", "|", "|a|b|\n|-|-|\n", "```\n", "~~~a\n", "#", "# a\n"),
    *("\n", " ", "\t", "a\n", "a"),
]


def test_markdown_becomes_these_elements(page: Page) -> None:
    found = page.js_async(SHOW + "return args[0].map((text) => plain(html([text])))", list(CASES))
    assert dict(zip(CASES, found, strict=True)) == CASES


def test_a_text_that_grows_becomes_the_same_elements(page: Page) -> None:
    """Cut at every character, and in three pieces, the result is that of the whole text."""
    script = """
    const wrong = [];
    for (const text of args[0]) {
      const whole = plain(html([text]));
      const cut = (i) => [text.slice(0, i), text.slice(i, i + 2), text.slice(i + 2)];
      const ways = [[...text], ...[...text].map((_, i) => cut(i))];
      const other = ways.find((pieces) => plain(html(pieces)) !== whole);
      if (other) wrong.push([other, whole, plain(html(other))]);
    }
    return wrong;
    """
    texts = [*CASES, *HOSTILE, "\n\n".join(CASES), "\n".join(CASES)]
    assert page.js_async(SHOW + script, texts) == []


def test_code_that_grows_keeps_its_element(page: Page) -> None:
    """So a selection in it stays, and a long block is not made anew for each token."""
    script = """
    const root = document.createElement("div");
    const view = new Markdown(root);
    view.append("Intro\\n\\n```py\\na\\n");
    view.paint();
    const before = root.querySelector("pre code").firstChild;
    for (let i = 0; i < 50; i += 1) { view.append(`line ${i}\\n`); view.paint(); }
    return [before === root.querySelector("pre code").firstChild, before.data.split("\\n").length];
    """
    assert page.js_async(SHOW + script) == [True, 52]


def test_no_text_takes_long(page: Page) -> None:
    """100 KB of what makes a careless parser quadratic, or a tree so deep that the browser gives up."""
    script = """
    const [piece, end] = args;
    const text = piece.repeat(Math.ceil(100_000 / piece.length)) + end.repeat(Math.ceil(100_000 / piece.length));
    const begun = performance.now();
    const root = html([text + "x"]);
    let deepest = 0;
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_ELEMENT);
    const depth = (node) => (node === root ? 0 : 1 + depth(node.parentNode));
    while (walk.nextNode()) deepest = Math.max(deepest, depth(walk.currentNode));
    return [performance.now() - begun, deepest];
    """
    for piece, end in [
        *((piece, "") for piece in REPEATED),
        ("**a ", "a** "),
        ("[", "](https://a.b)"),
        ("_*a ", "a*_ "),
    ]:
        milliseconds, deepest = page.js_async(SHOW + script, piece, end)
        assert milliseconds < 5000, piece
        assert deepest < 60, piece


def test_a_paint_that_costs_much_is_followed_by_a_long_rest(page: Page) -> None:
    """On a clock where every look takes 100 ms a message that grows all the time is painted once, not at every turn."""
    script = """
    const { MessageView } = await import("/page/message.js");
    const message = { role: "assistant", content: "" };
    let paints = 0;
    const view = new MessageView(message, "chat", {}, () => (paints += 1));
    const [now, real] = [performance.now, performance.now.bind(performance)];
    let clock = 0;
    performance.now = () => (clock += 100);
    for (const begun = real(); real() - begun < 300; await new Promise((resolve) => setTimeout(resolve, 5))) {
      message.content += "a ";
      view.grow();
    }
    performance.now = now;
    const before = paints;
    view.finish();
    return [before, view.node.querySelector("p").textContent === message.content.trim()];
    """
    assert page.js_async(script) == [1, True]


def test_a_long_stream_is_not_painted_for_each_token(page: Page, script: Script) -> None:
    """100 KB in one paragraph, in 2,000 pieces: what is painted over and over is bounded by what it costs."""
    script.pieces = ["word *em* [l](https://a.b/c) `code` and so on, on and on. " for _ in range(2000)]
    page.js("window.longest = 0; new PerformanceObserver((l) => { for (const e of l.getEntries())"
            " window.longest = Math.max(window.longest, e.duration) }).observe({ type: 'longtask' })")  # fmt: skip
    page.send("Long")
    eventually(lambda: page.texts(".assistant .stats") != [""] and not page["#stop"].is_displayed(), 30)
    assert len(page.answered()) > 70_000
    assert page.js("return document.querySelectorAll('.prose em').length") == 2000
    assert page.js("return window.longest") < 3000


def test_what_a_model_writes_does_not_run(page: Page, script: Script) -> None:
    for number, text in enumerate(HOSTILE, 1):
        script.pieces, script.reasoning = [text[i : i + 7] for i in range(0, len(text), 7)], (text,)
        page.paste(text)
        page.answered(number)
    page.load().ready()
    page.js("for (const d of document.querySelectorAll('details')) d.open = true")
    assert page.js("return window.ran") is None
    tags = page.js("return [...document.querySelectorAll('#messages .prose *')].map((e) => e.tagName)")
    assert set(tags) <= ALLOWED
    links = page.js("return [...document.querySelectorAll('#messages a')].map((e) => [e.protocol, e.rel, e.target])")
    assert links
    assert all(p in ("http:", "https:", "mailto:") and "noopener" in r and t == "_blank" for p, r, t in links)
    attributes = page.js(
        "return [...document.querySelectorAll('#messages .prose *')].flatMap((e) => e.getAttributeNames())"
    )
    assert not [a for a in attributes if a.startswith("on") or a in ("style", "src", "srcdoc", "id", "name")]
    assert page.texts(".user .body") == page.texts("details .plain") == HOSTILE
    shown = page.texts(".prose")
    assert [
        i for i, text in enumerate(HOSTILE) if ("<script>window.ran" in text) != ("<script>window.ran" in shown[i])
    ] == []


def test_hostile_names_and_files_stay_text(page: Page, script: Script) -> None:
    """Titles in the list, errors of the server, and imported conversations."""
    evil = "<img src=x onerror=window.ran=1>"
    script.refusal = 400, {"error": {"message": evil}}, {}
    page.send(evil)
    eventually(lambda: page.all(".error"))
    assert page.texts(".error .detail") == [evil]
    assert page.texts("#conversations .open") == [evil]
    assert page["#title"].text == evil
    page.js("""
      const c = { id: "x".repeat(12), kind: "<b>", title: args, messages: [
        { role: "system", content: "s" }, { role: "user", content: 3 }, { role: "assistant", content: "a", stats: "<b>",
          error: { message: { toString: 1 } }, end: ["x"], reasoning: 7 }, null, 5] };
      localStorage["cuplama.conversation." + c.id] = JSON.stringify(c);
      localStorage["cuplama.conversation.broken"] = "{";
      sessionStorage["cuplama.open"] = c.id;
    """.replace("args", json.dumps(evil)))  # fmt: skip
    page.load().ready()
    assert page["#title"].text == evil
    assert page.texts(".body") == ["", "a"]
    assert page.js("return window.ran") is None


def test_the_policy_stops_what_would_run(page: Page) -> None:
    """Were the page to make HTML of a text after all, the browser would still refuse."""
    attempts = (
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.ran=1>')",
        "document.body.innerHTML += '<svg onload=window.ran=1></svg>'",
        "document.createElement('script').textContent = 'window.ran = 1'",
        "setTimeout('window.ran = 1')",
    )
    refused = "try { (() => { %s })() } catch (error) { return error.name }"
    assert [page.js(refused % attempt) for attempt in attempts] == ["TypeError"] * len(attempts)
    page.js(
        "const a = document.createElement('a'); a.href = 'javascript:window.ran=1'; document.body.append(a); a.click()"
    )
    page.js("const i = new Image(); i.src = 'https://evil.example/leak'; document.body.append(i)")
    page.js("const s = document.createElement('style'); s.textContent = 'p{}'; document.body.append(s)")
    eventually(lambda: len([line for line in page.complaints() if "Content Security Policy" in line]) or True)
    assert page.js("return window.ran") is None
    assert page.js("return [...document.styleSheets].length") == 1
    page.complaints()
