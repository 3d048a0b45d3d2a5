"""The page that `serve` shows, in a real browser: what a reader does, and what a hostile answer must not do."""

from __future__ import annotations

import json

import pytest

from tests.browser.scripted_api import ScriptedApi

pytestmark = pytest.mark.browser

IS_DONE = "!state.busy"
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture
def api():
    running = ScriptedApi()
    yield running
    running.close()


@pytest.fixture
def page(browser, api):
    opened = browser.open(api.url)
    opened.wait_for("document.getElementById('facts').textContent")
    return opened


def ask(page, question):
    page.evaluate("document.getElementById('question').focus()")
    page.type(question)
    page.press("Enter")


def ask_and_hear(page, api, question, *pieces):
    """Ask, have the server say the pieces, and wait until the answer is there."""
    before = len(api.asked)
    api.answer(*pieces)
    ask(page, question)
    page.wait_for(f"{IS_DONE} && document.querySelectorAll('.turn.assistant').length > 0")
    assert len(api.asked) == before + 1


def test_an_answer_streams_and_is_remembered_in_the_next_question(page, api):
    ask(page, "How are you?")
    api.say.put("Quite ")
    page.wait_for("document.querySelector('.turn.assistant .words').innerText === 'Quite'")
    assert page.evaluate("Boolean(state.busy)")
    api.answer("well.")
    page.wait_for(IS_DONE)
    assert page.text(".turn.assistant .words") == "Quite well."
    assert "2 tokens" in page.text(".numbers")
    assert "12 of 8,192 in use" in page.text(".numbers")
    ask_and_hear(page, api, "And now?", "Still.")
    assert [m["content"] for m in api.asked[1]["messages"]] == ["How are you?", "Quite well.", "And now?"]
    assert page.complaints() == []


def test_the_model_and_its_licence_are_named(page):
    assert page.text("#model") == "mistral-7b-instruct"
    assert page.text("#facts") == "Apache-2.0 · 8,192 context"


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop_keeps_what_came_and_leaves_the_server(page, api, way):
    ask(page, "Count")
    api.say.put("one two")
    page.wait_for("document.querySelector('.turn.assistant .words').innerText === 'one two'")
    if way == "key":
        page.press("Escape")
    else:
        page.click("#stop")
    page.wait_for(IS_DONE)
    assert page.text(".turn.assistant .words") == "one two"
    assert "stopped" in page.text(".numbers")
    assert api.was_left.wait(20)


def test_a_reload_keeps_the_chat_and_clearing_forgets_it(page, api):
    ask_and_hear(page, api, "Remember", "I do.")
    page.reload()
    page.wait_for("document.querySelector('.turn.assistant .words')?.innerText === 'I do.'")
    assert page.text(".turn.user .words") == "Remember"
    page.click("#open")
    page.click("#forget")
    page.reload()
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    assert page.evaluate("document.getElementById('welcome').checkVisibility()")


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(page, api):
    ask(page, "Begin")
    api.say.put("a beginning")
    page.wait_for("document.querySelector('.turn.assistant .words')?.innerText === 'a beginning'")
    page.reload()
    assert page.text(".turn.assistant .words") == "a beginning"


@pytest.mark.parametrize("kept", ['{"version":1,"turns":[{"role":"system","content":1},null]}', "not json", "[]"])
def test_a_spoilt_store_is_an_empty_chat(page, kept):
    page.evaluate(f"localStorage.setItem('mistral-fetch.chat', {json.dumps(kept)})")
    page.reload()
    page.wait_for("document.getElementById('welcome').checkVisibility()")
    assert page.complaints() == []


HOSTILE = """<img src=x onerror="window.wasRun=1"><script>window.wasRun=1</script>

[a](javascript:window.wasRun=1) [b](data:text/html,x) **<b onclick=1>** `<i>`

```html
<script>window.wasRun=1</script>
```
"""


def test_markup_in_an_answer_stays_text(page, api):
    ask_and_hear(page, api, "<script>window.wasRun=1</script>", HOSTILE)
    words = page.text(".turn.assistant .words")
    assert '<img src=x onerror="window.wasRun=1"><script>window.wasRun=1</script>' in words
    assert "[a](javascript:window.wasRun=1)" in words
    assert page.text(".turn.user .words") == "<script>window.wasRun=1</script>"
    assert page.evaluate("document.querySelectorAll('.words img, .words script, .words a, .words i').length") == 0
    assert page.evaluate("window.wasRun === undefined")
    assert all(url.startswith(("http://127.0.0.1", "data:")) for url in page.requested_urls())


def test_the_policy_stops_what_the_page_did_not_bring(page):
    assert page.evaluate("try { document.body.innerHTML = '<p>'; false } catch (error) { true }")
    page.evaluate(
        "{ const s = document.createElement('style'); s.textContent = 'body{color:red}'; document.head.append(s) }"
    )
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    assert page.evaluate("fetch('http://127.0.0.1:1/').then(() => false, () => true)")
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


MARKDOWN = """# Title

Some **bold**, *leaning* and `code`, see [here](https://example.org/a) or https://example.org/b.

- one
- two
  - inner

3. third

> quoted

```python
print("<x>")
```"""


def test_markdown_becomes_what_it_means(page, api):
    ask_and_hear(page, api, "Format", *[MARKDOWN[i : i + 7] for i in range(0, len(MARKDOWN), 7)])
    found = page.evaluate(
        """(() => { const w = document.querySelector('.turn.assistant .words');
        const t = (s) => w.querySelector(s)?.textContent;
        return [t('h1'), t('strong'), t('em'), t('p code'), t('li li'), w.querySelector('ol').start, t('blockquote'),
                t('pre code'), t('.bar span'), [...w.querySelectorAll('a')].map((a) => a.href + ' ' + a.rel)] })()"""
    )
    rel = "noopener noreferrer nofollow"
    assert found == [
        *("Title", "bold", "leaning", "code", "inner", 3, "quoted", 'print("<x>")', "python"),
        [f"https://example.org/a {rel}", f"https://example.org/b {rel}"],
    ]


def test_marks_that_never_end_do_not_hang_the_page(page):
    for marks in ("**a", "[a](", "`", "_a ", "* ", "```\n", "> "):
        assert page.evaluate(f"renderWords(document.createElement('div'), {json.dumps(marks)}.repeat(30000)), true")


def test_answer_again_and_editing_replace_the_last_turn(page, api):
    ask_and_hear(page, api, "First", "Bad.")
    api.answer("Better.")
    page.click("[aria-label='Answer again']")
    page.wait_for(f"{IS_DONE} && document.querySelector('.turn.assistant .words').innerText === 'Better.'")
    page.click("[aria-label='Edit this question']")
    assert page.evaluate("document.getElementById('question').value") == "First"
    page.evaluate("document.getElementById('question').select()")
    ask_and_hear(page, api, "Second", "Best.")
    assert [m["content"] for m in api.asked[-1]["messages"]] == ["Second"]
    assert page.evaluate("document.querySelectorAll('.turn').length") == 2


def test_the_servers_refusal_is_shown_in_place_and_the_question_can_be_asked_again(page, api):
    api.refusals.append((400, {"error": {"message": "this model has no <chat> template", "code": None}}, {}))
    ask(page, "Hello")
    page.wait_for("document.querySelector('.notice.bad')")
    assert page.text(".notice p") == "this model has no <chat> template"
    api.answer("Hi.")
    page.click(".notice .quiet")
    page.wait_for(f"{IS_DONE} && document.querySelector('.turn.assistant')")
    assert page.evaluate("document.querySelector('.notice') === null")


def test_a_busy_server_is_asked_again_when_it_said(page, api):
    api.refusals.append((429, {"error": {"message": "too many questions"}}, {"Retry-After": "1"}))
    api.answer("At last.")
    ask(page, "Hello")
    page.wait_for("document.querySelector('.turn.assistant .words')?.innerText === 'At last.'")
    assert len(api.asked) == 2


def test_an_error_in_the_middle_of_an_answer_keeps_its_beginning(page, api):
    ask(page, "Hello")
    api.say.put("It was")
    api.say.put({"error": {"message": "the engine has ended"}})
    page.wait_for("document.querySelector('.notice.bad')")
    assert page.text(".notice p") == "the engine has ended"
    assert page.text(".turn.assistant .words") == "It was"


def test_settings_are_sent_and_the_key_stays_in_the_tab(page, api):
    for name, value in (("temperature", "0.5"), ("seed", "7"), ("system", "Be brief."), ("key", "secret")):
        page.evaluate(
            f"document.getElementById('{name}').value = '{value}';"
            f"document.getElementById('{name}').dispatchEvent(new Event('input', {{bubbles: true}}))"
        )
    ask_and_hear(page, api, "Hello", "Hi.")
    assert (api.asked[0]["temperature"], api.asked[0]["seed"]) == (0.5, 7)
    assert not {"top_p", "max_tokens"} & set(api.asked[0])
    assert api.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert api.keys == ["Bearer secret"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_shift_enter_starts_a_line(page, api):
    page.evaluate("document.getElementById('question').focus()")
    page.type("one")
    page.press("Enter", has_shift=True)
    page.type("two")
    ask_and_hear(page, api, "", "Hi.")
    assert api.asked[0]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_is_wider_than_the_window(page, api, width):
    page.resize(width, 700)
    ask_and_hear(page, api, "w" * 300, "v" * 300, "\n\n```\n" + "x" * 400 + "\n```\n\n" + "- " + "u" * 200)
    page.click("#open")
    for box in ("document.documentElement", "document.body", "document.getElementById('main')"):
        assert page.evaluate(f"{box}.scrollWidth <= {box}.clientWidth"), box


def test_dark_and_light_follow_the_system_until_the_reader_chooses(browser, api):
    dark, light = (browser.open(api.url, is_dark=is_dark) for is_dark in (True, False))
    assert dark.evaluate(PAPER) == "rgb(22, 21, 19)"
    assert light.evaluate(PAPER) == "rgb(250, 248, 244)"
    dark.click("#theme")
    dark.reload()
    assert dark.evaluate(PAPER) == "rgb(250, 248, 244)"


def test_the_keyboard_reaches_every_control_with_a_name(page, api):
    ask_and_hear(page, api, "Hello", "Hi.")
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        page.press("Tab")
        name = page.evaluate(
            "(() => { const e = document.activeElement; return e.getAttribute('aria-label') || e.innerText || e.id })()"
        )
        seen.append(name)
    assert {"New chat", "Dark mode", "Settings", "Edit this question", "Answer again", "Your message"} <= set(seen)
    assert page.evaluate("document.getElementById('log').getAttribute('aria-live')") == "polite"


def test_a_server_that_is_still_loading_says_so_and_is_watched(browser, api):
    api.engine = "loading"
    page = browser.open(api.url)
    page.wait_for("document.getElementById('facts').textContent === 'loading the model…'")
    api.engine = "ready"
    page.wait_for("document.getElementById('facts').textContent.startsWith('Apache-2.0')")
