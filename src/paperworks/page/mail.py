"""Mail: an outbox in the store, and its way to a mail server."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from functools import cache
from ipaddress import ip_address
from urllib.parse import parse_qs, unquote, urlsplit

import aiosmtplib
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.store import Store
from paperworks.page.tables import MailRow

_log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")
_LONGEST_ADDRESS = 254
# A minute, then four times as long each time: the sixth and last try is six hours after the first.
_FIRST_PAUSE, _PAUSE_GROWS, _TRIES = 60.0, 4, 6
# Longer than a try can last, for each of its commands ends after a minute.
_TRY_LOST = 900.0
_KEPT = 90 * 86400.0
_IN_DOUBT = "its sending ended before the mail server answered; it may have arrived, so it is not sent again"
# Header lines stay whole, since folding would encode long addresses; bodies are wrapped by their encoding.
_POLICY = SMTP_POLICY.clone(max_line_length=998, cte_type="7bit")


@dataclass(frozen=True)
class Mail:
    """A mail as it is written.

    Attributes:
        subject: Its subject, one line.
        text: Its text.
        html: The same as HTML.
        headers: Headers beside the usual ones.

    Raises:
        ValueError: Subject or a header has more than one line.

    Example:
        >>> Mail("Hello", "Hello.", "<p>Hello.</p>").subject
        'Hello'
    """

    subject: str
    text: str
    html: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in (self.subject, *self.headers, *self.headers.values()):
            if any(ord(character) < 32 for character in line) or line.splitlines() not in ([], [line]):
                raise ValueError(f"subject and headers of a mail are single lines, not {line!r}")


def address(email: str) -> str:
    """An e-mail address as it is kept: trimmed and in lower case.

    Raises:
        UsageError: It is none that mail can be sent to.

    Example:
        >>> address(" Ada@Example.org ")
        'ada@example.org'
    """
    kept = email.strip().lower()
    # Other letters become these in lower case: the Kelvin sign a k.
    if not email.strip().isascii() or len(kept) > _LONGEST_ADDRESS or ".." in kept or not _ADDRESS.fullmatch(kept):
        shown = kept[:80]
        raise UsageError(f"{shown!r} is no e-mail address; give one such as ada@example.org, without a name around it")
    return kept


def letter(subject: str, *, paragraphs: list[str], link: str, label: str, small: str) -> Mail:
    """A mail with one link in it.

    Args:
        subject: Its subject.
        paragraphs: What it says before the link.
        link: Address of the link.
        label: What following the link does.
        small: What it says at the end, in small letters.
    """
    told = {"subject": subject, "paragraphs": paragraphs, "link": link, "label": label, "small": small}
    return Mail(subject, written("letter.txt", **told), written("letter.html", **told))


def written(template: str, **values: object) -> str:
    """A mail's template with its values filled in; those of HTML are escaped."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("paperworks.page", "templates/mail"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


class Outbox:
    """Mails that wait in the store until `send_pending` sends them.

    Args:
        store: The lab's store.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db") as store:
        ...     Outbox(store).put("ada@example.org", Mail("Hello", "Hello.", "<p>Hello.</p>"))
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(
        self,
        to: str,
        mail: Mail,
        *,
        useful_for: float | None = None,
        session: Session | None = None,
    ) -> None:
        """Put a mail in the outbox; it is in the store when this returns.

        Args:
            to: Address it goes to.
            mail: The mail.
            useful_for: Seconds after which it is not sent any more.
            session: The caller's, to put it in together with what it tells of.

        Raises:
            UsageError: The address is none.
        """
        to, now = address(to), time.time()
        with nullcontext(session) if session is not None else self._store.writing() as writing:
            row = MailRow(
                recipient=to, subject=mail.subject, text=mail.text, html=mail.html,
                headers=dict(mail.headers), status="waiting", put=now, due=now,
                until=None if useful_for is None else now + useful_for, attempts=0,
            )  # fmt: skip
            writing.add(row)


@dataclass(frozen=True)
class Waiting:
    """A mail that was put in the outbox and not sent.

    Attributes:
        id: Its number.
        to: Address it goes to.
        subject: Its subject.
        put: When it was put in.
        text: Its text.
    """

    id: int
    to: str
    subject: str
    put: datetime
    text: str


def waiting(store: Store) -> list[Waiting]:
    """The mails that wait and are of use still, oldest first: without a mail server this is where to read them."""
    useful = or_(MailRow.until.is_(None), MailRow.until > time.time())
    query = select(MailRow).where(MailRow.status == "waiting", useful).order_by(MailRow.put, MailRow.id)
    with store.reading() as session:
        return [
            Waiting(row.id, row.recipient, row.subject, datetime.fromtimestamp(row.put, UTC), row.text)
            for row in session.scalars(query)
        ]


@dataclass(frozen=True)
class Sent:
    """What became of the mails that were due.

    Attributes:
        sent: How many the mail server took.
        failed: How many it did not take now; those that may succeed are tried again later.
    """

    sent: int
    failed: int


def send_pending(store: Store, smtp_url: str) -> Sent:
    """Send the mails that are due, each once, though several processes may send at the same time.

    What the server refuses for the time being is tried again after one minute, then four times as long each time, six
    times in all. A mail is marked before it is handed over: where the process or the connection ends before the
    server has answered, it may have arrived, and it is not sent again.

    Args:
        store: The lab's store.
        smtp_url: `smtp://user:password@host:port` (encrypted where the server can, and always where a password goes
            to another machine) or `smtps://…` (encrypted from the start); user and password percent-encoded;
            `?from=paperworks@example.org` says who the mails are from.

    Returns:
        How many were sent, and how many could not be.

    Raises:
        UsageError: The URL is none.
        PaperworksError: The mail server does not answer or refuses the password; the mails wait.
    """
    return asyncio.run(_send_pending(store, _Server.of(smtp_url)))


def keep_sending(store: Store, smtp_url: str, stop: threading.Event, seconds: float = 5.0) -> None:
    """Send what comes into the outbox until told to stop; a thread's work.

    Args:
        store: The lab's store.
        smtp_url: As for `send_pending`.
        stop: Set it to end this.
        seconds: How often to look; where the mail server does not answer, ten times as long.
    """
    while True:
        pause = seconds
        try:
            send_pending(store, smtp_url)
        except PaperworksError as error:
            _log.warning("%s", error)
            pause = 10 * seconds
        if stop.wait(pause):
            return


@dataclass(frozen=True)
class _Server:
    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None = field(repr=False)
    sender: str

    @classmethod
    def of(cls, url: str) -> _Server:
        # The URL holds a password, so that no message repeats it.
        cure = "give smtp://user:password@host:port or smtps://…, user and password percent-encoded"
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
        except ValueError:
            raise UsageError(f"the mail server's URL is not one; {cure}") from None
        if parts.scheme not in ("smtp", "smtps") or not host:
            raise UsageError(f"the mail server's URL names no host, or is not of smtp; {cure}")
        user, password = (unquote(part) if part else None for part in (parts.username, parts.password))
        given = parse_qs(parts.query).get("from")
        domain = "localhost" if _loopback(host) else host
        sender = given[0] if given else user if user and "@" in user else f"paperworks@{domain}"
        tls = parts.scheme == "smtps"
        return cls(host, port or (465 if tls else 587 if user else 25), tls, user, password, address(sender))

    def client(self) -> aiosmtplib.SMTP:
        """A client that gives no password to another machine in the open."""
        in_secret = True if self.user and not self.tls and not _loopback(self.host) else None
        return aiosmtplib.SMTP(
            hostname=self.host, port=self.port, username=self.user, password=self.password, use_tls=self.tls,
            start_tls=False if self.tls else in_secret, timeout=60,
        )  # fmt: skip


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _send_pending(store: Store, server: _Server) -> Sent:
    sent, failed = 0, _tidy(store)
    client = server.client()
    try:
        while _is_due(store):
            if not client.is_connected:
                await _connect(client, server)
            mail = _taken(store)
            if mail is None:
                break
            status, error = await _handed_over(client, server.sender, mail)
            _keep(store, mail, status, error)
            sent, failed = sent + (status == "sent"), failed + (status != "sent")
    finally:
        if client.is_connected:
            try:
                await client.quit()
            except (aiosmtplib.SMTPException, OSError):
                client.close()
    return Sent(sent, failed)


async def _connect(client: aiosmtplib.SMTP, server: _Server) -> None:
    try:
        await client.connect()
    except (aiosmtplib.SMTPException, OSError) as error:
        reason = " ".join(str(error).split())
        raise PaperworksError(
            f"the mail server {server.host}:{server.port} does not take mail ({reason}); the mails wait in the outbox"
        ) from None


async def _handed_over(client: aiosmtplib.SMTP, sender: str, mail: MailRow) -> tuple[str, str | None]:
    """How a mail stands after an attempt: sent, waiting or failed, and why."""
    try:
        content = _message(sender, mail).as_bytes()
    except ValueError as error:
        # One that cannot be written does not keep the others.
        return "failed", f"it cannot be written as a mail: {error}"
    try:
        try:
            await client.mail(sender)
            await client.rcpt(mail.recipient)
        except aiosmtplib.SMTPResponseException as refusal:
            await client.rset()
            # A sender that is refused is for the operator to put right; the mails wait for that.
            lasting = refusal.code >= 500 and not isinstance(refusal, aiosmtplib.SMTPSenderRefused)
            return "failed" if lasting else "waiting", f"{refusal.code} {refusal.message}"
    except (aiosmtplib.SMTPException, OSError) as lost:
        client.close()
        return "waiting", str(lost)
    try:
        await client.data(content)
    except aiosmtplib.SMTPResponseException as refusal:
        return "failed" if refusal.code >= 500 else "waiting", f"{refusal.code} {refusal.message}"
    except (aiosmtplib.SMTPException, OSError):
        client.close()
        return "failed", _IN_DOUBT
    return "sent", None


def _message(sender: str, mail: MailRow) -> EmailMessage:
    message = EmailMessage(_POLICY)
    message["From"] = f"Paperworks <{sender}>"
    message["To"] = mail.recipient
    message["Subject"] = mail.subject
    message["Date"] = format_datetime(datetime.fromtimestamp(mail.put, UTC))
    # The same at every try.
    message["Message-ID"] = f"<{mail.put:.6f}.{mail.id}@{sender.partition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    for name, value in mail.headers.items():
        message[name] = value
    message.set_content(mail.text)
    message.add_alternative(mail.html, subtype="html")
    return message


def _due(now: float) -> tuple[ColumnElement[bool], ...]:
    return MailRow.status == "waiting", MailRow.due <= now


def _is_due(store: Store) -> bool:
    with store.reading() as session:
        return session.scalar(select(MailRow.id).where(*_due(time.time())).limit(1)) is not None


def _taken(store: Store) -> MailRow | None:
    """The mail to send next, marked so that nobody else sends it."""
    now = time.time()
    with store.writing(alone=True) as session:
        first = select(MailRow).where(*_due(now)).order_by(MailRow.due, MailRow.id).limit(1)
        mail = session.scalar(first)
        if mail is None:
            return None
        mail.status, mail.due, mail.attempts = "sending", now, mail.attempts + 1
        session.flush()
        session.expunge(mail)
    return mail


def _keep(store: Store, mail: MailRow, status: str, error: str | None) -> None:
    values: dict[str, object] = {"status": status, "error": error}
    if status == "waiting" and mail.attempts >= _TRIES:
        values["status"] = "failed"
    elif status == "waiting":
        values["due"] = time.time() + _FIRST_PAUSE * _PAUSE_GROWS ** (mail.attempts - 1)
    if values["status"] != "waiting":
        values |= _FORGOTTEN
    with store.writing() as session:
        session.execute(update(MailRow).where(MailRow.id == mail.id).values(values))


# Links in a mail are secrets, of which nothing is kept once it has gone.
_FORGOTTEN: dict[str, object] = {"text": "", "html": "", "headers": {}}


def _tidy(store: Store) -> int:
    """Give up what is in doubt or of no use any more, forget what is long past, and say how many were given up."""
    now = time.time()
    lost = update(MailRow).where(MailRow.status == "sending", MailRow.due < now - _TRY_LOST)
    late = update(MailRow).where(MailRow.status == "waiting", MailRow.until < now)
    past = delete(MailRow).where(or_(MailRow.status == "sent", MailRow.status == "failed"), MailRow.put < now - _KEPT)
    with store.writing(alone=True) as session:
        session.execute(past)
        given_up = [
            session.scalars(mails.values(status="failed", error=reason, **_FORGOTTEN).returning(MailRow.id)).all()
            for mails, reason in ((lost, _IN_DOUBT), (late, "it was of no use any more when it could be sent"))
        ]
    return sum(map(len, given_up))
