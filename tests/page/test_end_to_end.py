"""The page as readers meet it: in a browser, through the mail, on a phone, with a screen reader, without JavaScript."""

from __future__ import annotations

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from paperworks.lab import Run, Store
from paperworks.page.mail import send_pending
from paperworks.page.subscriptions import SubscriptionRow
from tests.page.mailserver import MailServer
from tests.page.serving import serving, sqlite

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
# A recipe takes seconds here and a minute where all else runs too.
PATIENCE = 150_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
        monkeypatch.delenv("PAPERWORKS_SMTP", raising=False)
        with serving(sqlite(folder)) as server:
            yield server


@pytest.fixture(scope="module")
def store(server):
    with Store(server.store_url) as store:
        yield store


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A new reader's page; what its console complains of, a breach of the content policy say, fails the test."""
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    complaints = []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def mailbox():
    with MailServer() as server:
        yield server


def register(page, email):
    page.goto("/register")
    page.get_by_label("E-mail").fill(email)
    page.get_by_label("Password").fill("correct horse battery staple")
    page.get_by_role("button", name="Register").click()
    expect(page.get_by_role("button", name="Log out")).to_be_visible()


def test_a_reader_searches_and_finds_decoding_papers_first(page):
    page.goto("/")
    page.get_by_role("searchbox", name="Search papers").fill("make my llm faster")
    page.get_by_role("searchbox", name="Search papers").press("Enter")
    expect(page).to_have_url(re.compile(r"/search\?q=make\+my\+llm\+faster"))
    first = page.locator("ol.papers > li").first
    expect(first.get_by_role("link", name="decoding", exact=True)).to_be_visible()
    first.get_by_role("heading").get_by_role("link").click()
    expect(page).to_have_url(re.compile("/papers/"))
    expect(page.get_by_role("heading", level=1)).to_be_visible()


def test_a_reader_narrows_a_search(page):
    page.goto("/search?q=draft")
    page.get_by_label("Room").select_option("decoding")
    apply = page.get_by_role("button", name="Apply")
    if apply.is_visible():
        apply.click()
    expect(page).to_have_url(re.compile("room=decoding"))
    rooms = page.locator("ol.papers > li .meta a[href^='/rooms/']").all_text_contents()
    assert rooms and set(rooms) == {"decoding"}


def test_a_reader_votes_and_takes_the_vote_back(page, store):
    page.goto("/papers/hydra")
    page.locator("main .vote a").click()
    expect(page).to_have_url(re.compile("/login"))
    register(page, "voter@example.org")
    page.goto("/papers/hydra")
    vote = page.locator("main .vote").first.get_by_role("button")
    expect(vote).to_have_attribute("aria-pressed", "false")
    vote.click()
    expect(page.locator("main .vote").first.get_by_role("button", pressed=True)).to_have_text("1")
    expect(page.get_by_role("button", name="Take back your vote for Hydra", exact=False)).to_be_focused()
    page.reload()
    pressed = page.locator("main .vote").first.get_by_role("button", pressed=True)
    expect(pressed).to_have_text("1")
    pressed.click()
    expect(page.locator("main .vote").first.get_by_role("button", pressed=False)).to_have_text("0")


def test_a_reader_subscribes_and_confirms_through_the_mail_and_ends_it(page, store, mailbox):
    page.goto("/search?q=speculative+decoding")
    page.get_by_role("link", name="Digest by mail").click()
    expect(page.get_by_label("Search", exact=True)).to_have_value("speculative decoding")
    page.get_by_label("E-mail").fill("reader@example.org")
    page.get_by_label("daily").check()
    page.get_by_role("main").get_by_role("button", name="Subscribe").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The mail is kept, not sent")
    subscribed = confirmed(store)
    assert subscribed == {"reader@example.org": False}

    assert sent(store, mailbox) == 1
    [mail] = mailbox.mails
    assert mail["To"] == "reader@example.org"
    text = mail.get_body(("plain",)).get_content()
    page.goto(link(text, "confirm"))
    assert confirmed(store) == {"reader@example.org": False}, "looking at the link is not confirming"
    page.get_by_role("main").get_by_role("button").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("You are subscribed")
    assert confirmed(store) == {"reader@example.org": True}

    with store.reading() as session:
        farewell = session.query(SubscriptionRow).one().farewell
    page.goto(f"/unsubscribe/{farewell}")
    page.get_by_role("main").get_by_role("button").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("You are unsubscribed")
    assert confirmed(store) == {}


def confirmed(store):
    with store.reading() as session:
        return {row.email: row.confirmed is not None for row in session.query(SubscriptionRow)}


def sent(store, mailbox):
    # Playwright's own event loop is at work in this thread.
    with ThreadPoolExecutor() as pool:
        return pool.submit(send_pending, store, mailbox.url).result().sent


def link(text, kind):
    return re.search(rf"http://\S+/{kind}/\S+", text)[0]


def test_a_reader_signs_in_by_a_link_in_the_mail(page, store, mailbox):
    page.goto("/login")
    page.get_by_label("E-mail").fill("newcomer@example.org")
    page.get_by_role("main").get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The mail is kept, not sent")
    sent(store, mailbox)
    page.goto(link(mailbox.mails[-1].get_body(("plain",)).get_content(), "login/link"))
    page.get_by_role("main").get_by_role("button", name="Log in").click()
    expect(page.get_by_role("button", name="Log out")).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("link", name="Log in", exact=True)).to_be_visible()


@pytest.fixture(scope="module")
def mailing(tmp_path_factory):
    """A server that names a mail server, so that addresses are confirmed, and the mail server."""
    with MailServer() as post, pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("mailing")
        monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
        monkeypatch.setenv("PAPERWORKS_SMTP", post.url)
        with serving(sqlite(folder)) as server:
            yield server, post


def mailed(post, count):
    """The link in the mail of this number, once it has come."""
    deadline = time.monotonic() + PATIENCE / 1000
    while len(post.mails) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return link(post.mails[count - 1].get_body(("plain",)).get_content(), "password")


def test_a_reader_registers_by_mail_changes_the_password_and_replaces_it_without_javascript(browser, mailing):
    server, post = mailing
    came = len(post.mails)
    context = browser.new_context(base_url=server.url, java_script_enabled=False)
    page = context.new_page()
    main = page.get_by_role("main")
    page.goto("/register")
    expect(page.get_by_label("Password")).to_have_count(0)
    page.get_by_label("E-mail").fill("ada@example.org")
    main.get_by_role("button", name="Register").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Look into your mail")
    page.goto(mailed(post, came + 1))
    expect(page.get_by_label("E-mail")).to_have_value("ada@example.org")
    # What does not fit is said where it stands; the browser would not send it.
    page.locator("main form").evaluate("form => form.noValidate = true")
    page.get_by_label("Password").fill("short")
    main.get_by_role("button", name="Choose a password").click()
    expect(page.get_by_role("alert")).to_contain_text("8 to 1024 characters")
    page.get_by_label("Password").fill("correct horse battery")
    main.get_by_role("button", name="Choose a password").click()
    page.get_by_role("link", name="Account").click()
    page.get_by_label("Old password").fill("wrong horse battery")
    page.get_by_label("New password").fill("staple staple staple")
    main.get_by_role("button", name="Change password").click()
    expect(page.get_by_role("alert")).to_contain_text("is not the password that you have")
    page.get_by_label("Old password").fill("correct horse battery")
    page.get_by_label("New password").fill("staple staple staple")
    main.get_by_role("button", name="Change password").click()
    expect(page).to_have_url(f"{server.url}/account")
    expect(page.get_by_role("alert")).to_have_count(0)
    other = browser.new_context(base_url=server.url).new_page()
    other.goto("/login")
    other.get_by_role("link", name="Password forgotten").click()
    other.get_by_label("E-mail").fill("ada@example.org")
    other.get_by_role("button", name="Send the mail").click()
    other.goto(mailed(post, came + 2))
    other.get_by_label("Password").fill("a third secret")
    other.get_by_role("button", name="Choose a new password").click()
    expect(other.get_by_role("button", name="Log out")).to_be_visible()
    page.reload()
    expect(page).to_have_url(re.compile("/login"))
    other.context.close()
    context.close()


def test_axe_finds_no_violation_on_what_a_mailed_link_leads_to(browser, mailing):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    server, post = mailing
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    links = []
    for form in ("/register", "/forgotten"):
        came = len(post.mails)
        page.goto(form)
        page.get_by_label("E-mail").fill(f"{form[1:]}@example.org")
        page.get_by_role("main").get_by_role("button").click()
        links.append(mailed(post, came + 1))
    violations = audit(page, axe, ["/register", "/forgotten", *links])
    page.goto(links[0])
    page.locator("main form").evaluate("form => form.noValidate = true")
    page.get_by_role("main").get_by_role("button").click()
    expect(page.get_by_role("alert")).to_be_visible()
    violations += audit(page, axe, [None])
    context.close()
    assert not violations, "\n".join(map(str, violations))


def test_a_reader_starts_a_tiny_run_and_watches_it_finish(page, store):
    register(page, "runner@example.org")
    page.goto("/papers/hydra")
    page.get_by_label("Scale").select_option("tiny")
    page.get_by_text("Parameters", exact=True).click()
    page.get_by_label("equality prompts").fill("1")
    page.get_by_role("button", name="Run it").click()
    expect(page).to_have_url(re.compile("/runs/"))
    # What follows comes by events: the page is not loaded anew until the run is over.
    page.evaluate("window.first = true")
    expect(page.locator("[data-events] progress").first).to_be_attached(timeout=PATIENCE)
    assert page.evaluate("window.first === true")
    assert page.locator("[data-told]").text_content()
    expect(page.locator("[data-run=finished]")).to_contain_text("finished in", timeout=PATIENCE)
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(page.get_by_role("region", name="Measurements")).to_contain_text("Hydra")
    figure = page.get_by_role("figure").get_by_role("img").first
    assert figure.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    run = store.run(page.url.rpartition("/")[2])
    assert (run.status, run.scale, run.parameters["equality_prompts"]) == ("finished", "tiny", 1)
    page.goto("/papers/hydra")
    expect(page.get_by_role("link", name=re.compile("ago|just now")).first).to_have_attribute("href", f"/runs/{run.id}")


def test_a_refused_value_leaves_the_form_filled_in_and_has_the_focus(browser, server, store):
    # Of its own, for the console complains of a refusal.
    page = browser.new_context(base_url=server.url).new_page()
    register(page, "refused@example.org")
    before = len(store.runs())
    page.goto("/papers/hydra")
    page.get_by_text("Parameters", exact=True).click()
    page.get_by_label("nodes").fill("9999")
    page.get_by_label("new tokens").fill("12")
    # The browser itself would not send it.
    page.locator("form.parameters").evaluate("form => form.noValidate = true")
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("alert")).to_contain_text("nodes is at most 32 in a run from the page, not 9999")
    expect(page.get_by_label("nodes")).to_be_focused()
    expect(page.get_by_label("nodes")).to_be_in_viewport()
    expect(page.get_by_label("nodes")).to_have_value("9999")
    expect(page.get_by_label("new tokens")).to_have_value("12")
    assert len(store.runs()) == before
    page.context.close()


def test_a_reader_cancels_a_run(page, store):
    register(page, "canceller@example.org")
    page.goto("/papers/hydra")
    page.get_by_label("Scale").select_option("default")
    page.get_by_role("button", name="Run it").click()
    expect(page).to_have_url(re.compile("/runs/"))
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("[data-run=interrupted]")).to_have_text("interrupted: cancelled", timeout=PATIENCE)
    assert store.run(page.url.rpartition("/")[2]).error == "cancelled"


def test_nobody_starts_a_run_without_signing_in(page, store):
    before = len(store.runs())
    page.goto("/papers/hydra")
    expect(page.get_by_role("button", name="Run it")).to_have_count(0)
    page.locator("form.parameters").evaluate("form => form.requestSubmit()")
    expect(page).to_have_url(re.compile("/login"))
    assert len(store.runs()) == before


def test_all_of_it_goes_without_javascript(browser, server):
    context = browser.new_context(base_url=server.url, java_script_enabled=False)
    page = context.new_page()
    register(page, "plain@example.org")
    page.get_by_role("searchbox", name="Search papers").fill("sparse")
    page.get_by_role("searchbox", name="Search papers").press("Enter")
    page.get_by_label("Room").select_option("sparsity")
    page.get_by_role("button", name="Apply").click()
    expect(page).to_have_url(re.compile("room=sparsity"))
    page.locator("ol.papers > li").first.locator(".vote button").click()
    expect(page.locator("ol.papers > li .vote").get_by_role("button", pressed=True)).to_have_count(1)
    page.goto("/papers/hydra")
    page.get_by_label("Scale").select_option("default")
    page.get_by_role("button", name="Run it").click()
    expect(page).to_have_url(re.compile("/runs/"))
    # The page looks anew by itself.
    with page.expect_navigation(timeout=PATIENCE):
        pass
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("[data-run=interrupted]")).to_be_visible(timeout=PATIENCE)
    context.close()


def test_the_keyboard_goes_past_the_header_to_the_papers(page):
    page.goto("/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")


PAGES = (
    "/", "/new", "/search?q=make+my+llm+faster", "/search?q=zzzz+qqqq", "/papers/hydra", "/papers/chimera", "/papers/maskllm",
    "/rooms", "/rooms/decoding", "/submit", "/subscribe", "/login", "/register", "/forgotten", "/confirm/x",
    "/unsubscribe/x", "/login/link/x", "/no-such-page", "/runs", "/runs/compare?run={finished}&run={failed}", "/runs/{finished}", "/runs/{failed}", "/runs/{running}",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(store):
    """Runs in each state, as their pages show them."""
    from matplotlib.figure import Figure

    made = {}
    for status in ("finished", "failed", "running"):
        run = Run("hydra", {"new_tokens": 8, "model": "tiny"}, recorder=store, artefacts=store.artefacts)
        store.begin(run)
        run.log("looking")
        for series in ("plain", "Hydra"):
            run.record("speed", 20, unit="tokens/s", better="higher", series=series)
            run.record("calls", 2, better="lower", series=series)
        run.figure(Figure())
        bar = run.progress(8, "decoding")
        bar.__enter__()
        bar.advance(3)
        run.progressed(turn=True)
        if status != "running":
            run.status, run.finished = status, run.started
            run.error = "ValueError: no" if status == "failed" else None
            store.end(run)
        made[status] = run.id
    yield made
    run.status = "interrupted"
    store.end(run)


# Tables that are wider than the room they have.
HIDING = """[...document.querySelectorAll(".scrolls")]
    .filter(region => region.scrollWidth > region.clientWidth + 1).map(region => region.getAttribute("aria-label"))"""


def audit(page, axe, paths):
    """What breaks a rule on these pages (None: the one that is open), in light and dark, on phone and desktop."""
    broken = []
    for path in paths:
        for width, height in ((375, 700), (1280, 800)):
            page.set_viewport_size({"width": width, "height": height})
            if path is not None:
                page.goto(path)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                for rule in axe.run(page).response["violations"]:
                    broken += [(path, width, scheme, rule["id"], *node["target"]) for node in rule["nodes"]]
            if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                broken.append((path, width, "scrolls sideways"))
            broken += [(path, width, "hides columns", label) for label in page.evaluate(HIDING)]
    return broken


@pytest.mark.parametrize("signed_in", [False, True], ids=["reader", "signed in"])
def test_axe_finds_no_violation_light_and_dark_on_phone_and_desktop(browser, server, runs, signed_in):
    axe_module = pytest.importorskip("axe_playwright_python.sync_playwright")
    axe = axe_module.Axe()
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    if signed_in:
        register(page, "axe@example.org")
    pages = (
        ("/papers/hydra", "/search?q=draft", "/submit", "/account", "/reading", "/runs", "/") if signed_in else PAGES
    )
    violations = audit(page, axe, [path.format(**runs) for path in pages])
    context.close()
    assert not violations, "\n".join(map(str, violations))
