"""A mail server on this machine, whose answers a test decides."""

from __future__ import annotations

import email
import time
from email.message import EmailMessage
from email.policy import default

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from paperworks.page.load import free_port


class MailServer:
    """Takes mails; `refuse` answers RCPT of an address, and `answer` answers DATA of one ("drop" hangs up)."""

    def __init__(self, password: str | None = None, port: int | None = None) -> None:
        self.received: list[tuple[str, EmailMessage]] = []
        self.senders: list[str] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self.refuse: dict[str, str] = {}
        self.answer: dict[str, str] = {}
        self.pause = 0.0
        self._password = password
        self.port = port or free_port()
        # Nothing leaves this machine, so that no encryption is asked for.
        secured = {} if password is None else {"authenticator": self._authenticate, "auth_required": True}
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port, auth_require_tls=False, **secured)

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    @property
    def mails(self) -> list[EmailMessage]:
        return [mail for _, mail in self.received]

    @property
    def recipients(self) -> list[str]:
        return [to for to, _ in self.received]

    def __enter__(self) -> MailServer:
        self._controller.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._controller.stop()

    def _authenticate(self, server, session, envelope, mechanism, data):
        self.logins.append((data.login, data.password))
        return AuthResult(success=data.password.decode() == self._password, handled=False)

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address in self.refuse:
            return self.refuse[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        (to,) = envelope.rcpt_tos
        time.sleep(self.pause)
        answer = self.answer.get(to, "250 OK")
        if answer.startswith("250") or answer == "drop":
            self.received.append((to, email.message_from_bytes(envelope.content, policy=default)))
            self.senders.append(envelope.mail_from)
        if answer == "drop":
            server.transport.abort()
        return answer
