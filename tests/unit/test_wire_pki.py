"""The small authority: what it writes, and what it refuses."""

from __future__ import annotations

import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from podferry.errors import UsageError
from podferry.wire.pki import Authority, check_node_name
from podferry.wire.tls import Credentials

pytestmark = pytest.mark.unit


def test_a_certificate_carries_name_addresses_and_both_uses(tmp_path: Path) -> None:
    Authority.create(tmp_path / "ca")
    Authority.load(tmp_path / "ca").issue("node-a", ["10.0.0.1", "fd00::1"], tmp_path / "a")
    certificate = x509.load_pem_x509_certificate((tmp_path / "a" / "node.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-a"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(a) for a in ("10.0.0.1", "fd00::1")]
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert Credentials.load(tmp_path / "a").node == "node-a"


def test_keys_are_for_their_owner_alone_and_files_are_replaced_whole(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    for _ in range(2):
        authority.issue("node-a", [], tmp_path / "a")
    for key in (tmp_path / "ca" / "ca.key", tmp_path / "a" / "node.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["ca.crt", "node.crt", "node.key"]
    assert Credentials.load(tmp_path / "a")


def test_an_authority_is_not_made_over_another(tmp_path: Path) -> None:
    Authority.create(tmp_path)
    before = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(UsageError, match="already"):
        Authority.create(tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == before


@pytest.mark.parametrize("damage", ["ca.key", "ca.crt"])
def test_a_damaged_or_missing_authority_is_refused(tmp_path: Path, damage: str) -> None:
    Authority.create(tmp_path)
    (tmp_path / damage).write_text("nonsense")
    with pytest.raises(UsageError, match="no usable authority"):
        Authority.load(tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(UsageError, match="no usable authority"):
        Authority.load(tmp_path)


@pytest.mark.parametrize("damage", ["ca.crt", "node.crt", "node.key"])
def test_damaged_missing_or_foreign_node_files_are_refused(tmp_path: Path, damage: str) -> None:
    authority = Authority.create(tmp_path / "ca")
    authority.issue("node-a", [], tmp_path / "a")
    (tmp_path / "a" / damage).write_text("nonsense")
    with pytest.raises(UsageError, match="no usable"):
        Credentials.load(tmp_path / "a")
    (tmp_path / "a" / damage).unlink()
    with pytest.raises(UsageError, match="no usable"):
        Credentials.load(tmp_path / "a")


def test_a_key_that_does_not_belong_to_its_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    for name in ("a", "b"):
        authority.issue(f"node-{name}", [], tmp_path / name)
    (tmp_path / "a" / "node.key").write_bytes((tmp_path / "b" / "node.key").read_bytes())
    with pytest.raises(UsageError, match="no usable certificates"):
        Credentials.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["node-a", "a", "a.b.c", "ip-10-0-0-1.ec2.internal", "x" * 63, "1a", "node.1a"])
def test_names_of_nodes(name: str) -> None:
    assert check_node_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a-",
        "A",
        "a_b",
        "a b",
        "ä",
        "*",
        "*.a",
        "10.0.0.1",
        "7",
        "::1",
        "x" * 64,
        "a\n",
        "a." * 127 + "a",
    ],
)
def test_what_cannot_be_a_nodes_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        check_node_name(name)
    with pytest.raises(UsageError):
        Authority.create(tmp_path).issue(name, [], tmp_path / "a")


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no certificate for node-a"):
        Authority.create(tmp_path).issue("node-a", ["node-a"], tmp_path / "a")
