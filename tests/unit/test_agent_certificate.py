"""A change of the authority overlaps: nobody shows what the other side does not trust yet."""

from __future__ import annotations

import datetime
from pathlib import Path

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from podferry.agent import certificate
from podferry.agent.certificate import OVERLAP, RENEW, usable
from podferry.wire.pki import AGENT_LIFE, BACKDATED, CA_CERTIFICATE, Authority, with_former
from podferry.wire.tls import Credentials
from podferry.wire.transport import dial, listen, serve

pytestmark = pytest.mark.unit


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def pem(authority: Authority) -> bytes:
    return authority.certificate.public_bytes(serialization.Encoding.PEM)


def certified(authority: Authority, node: str, into: Path, left: datetime.timedelta = AGENT_LIFE) -> Path:
    authority.issue(node, ["127.0.0.1"], into, not_after=now() + left)
    return into


def test_a_certificate_is_renewed_long_before_it_ends(tmp_path: Path) -> None:
    authority = Authority.new()
    hour = datetime.timedelta(hours=1)
    assert usable(certified(authority, "a", tmp_path / "new"), "a") is None
    assert usable(certified(authority, "a", tmp_path / "fine", RENEW + hour), "a") is None
    assert usable(certified(authority, "a", tmp_path / "late", RENEW - hour), "a") == "it ends soon"
    assert usable(tmp_path / "new", "b") == "it is another node's"
    assert usable(tmp_path / "none", "a") == "there is none"


def test_while_a_new_authority_is_young_the_old_ones_certificate_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Authority.new(), Authority.new()
    mine = certified(old, "a", tmp_path / "a")
    published = with_former(pem(new), pem(old).decode()).encode()
    assert usable(mine, "a", published) is None
    monkeypatch.setattr(certificate, "OVERLAP", -BACKDATED - OVERLAP)
    assert usable(mine, "a", published) == "the authority has changed"
    assert usable(mine, "a", pem(new)) == "the authority has changed", "nobody trusts the old one any more"
    assert usable(certified(new, "a", tmp_path / "b"), "a", published) is None


def test_a_former_authority_is_trusted_as_long_as_its_certificates_live() -> None:
    old, new, newest = Authority.new(), Authority.new(), Authority.new()
    both = with_former(pem(new), pem(old).decode())
    assert both.encode() == pem(new) + pem(old)
    assert with_former(pem(new), both) == both, "published again, it is the same"
    assert with_former(pem(newest), both).encode() == pem(newest) + pem(new) + pem(old)
    assert with_former(pem(new), both, now=now() + AGENT_LIFE + BACKDATED).encode() == pem(new)
    assert with_former(pem(new), "no certificate").encode() == pem(new)
    assert len(x509.load_pem_x509_certificates(with_former(pem(old), both * 5).encode())) <= 3


@pytest.mark.parametrize(("dials", "serves"), [("old", "new"), ("new", "old"), ("old", "old")])
def test_agents_talk_throughout_a_change(dials: str, serves: str, tmp_path: Path) -> None:
    """Real connections, whichever of the two has a certificate of the new authority first."""
    authorities = {"old": Authority.new(), "new": Authority.new()}
    published = with_former(pem(authorities["new"]), pem(authorities["old"]).decode())
    for node, which in (("node-a", dials), ("node-b", serves)):
        (certified(authorities[which], node, tmp_path / node) / CA_CERTIFICATE).write_text(published)
    heard: list[str] = []

    async def talk() -> None:
        listener = listen("127.0.0.1:0")
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        async def handler(channel: object) -> None:
            heard.append("yes")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, listener, Credentials.load(tmp_path / "node-b"), handler, lambda error: None)
            with anyio.fail_after(30):
                async with dial("node-b", address, Credentials.load(tmp_path / "node-a")):
                    while not heard:
                        await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

    anyio.run(talk)
