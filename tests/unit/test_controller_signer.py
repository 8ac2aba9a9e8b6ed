"""Which certificates the controller signs: an agent's, for its own node and for its own key, and no other."""

from __future__ import annotations

import base64
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from podferry.agent.certificate import request
from podferry.controller.signer import BUNDLE, NODE_EXTRA, NODE_UID_EXTRA, SECRET, SIGNER, Signer, authority
from podferry.errors import PodferryError, Refused
from podferry.kube.api_errors import ObjectAlreadyExists
from podferry.kube.client import Api
from podferry.wire.pki import Authority

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
Json = dict[str, Any]
ACCOUNT = "system:serviceaccount:podferry-system:podferry-agent"
USAGES = ["digital signature", "server auth", "client auth"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeApi:
    """One signing request and one node, which may be missing."""

    def __init__(self, asked: Json | None, node: Json | None) -> None:
        self.asked, self._node = asked, node
        self.written: list[tuple[str, Json]] = []

    async def find(self, kind: Any, name: str) -> Json | None:
        return self._node if kind.kind == "Node" else self.asked

    async def replace(self, kind: Any, changed: Json, part: str) -> Json:
        self.written.append((part, changed["status"]))
        return changed


def node(uid: str = "n1") -> Json:
    addresses = [("InternalIP", "10.0.0.1"), ("ExternalIP", "192.0.2.1"), ("Hostname", "node-a")]
    about = {"name": "node-a", "uid": uid}
    return {"metadata": about, "status": {"addresses": [{"type": kind, "address": one} for kind, one in addresses]}}


def encoded(pem: bytes) -> str:
    return base64.b64encode(pem).decode()


def asked_for(name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return encoded(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


KEY = ec.generate_private_key(ec.SECP256R1())


def spec(**changed: Any) -> Json:
    """What an agent of node-a asks for, with the user and the extra fields that the API server has put there."""
    return {
        "signerName": SIGNER,
        "username": ACCOUNT,
        "extra": {NODE_EXTRA: ["node-a"], NODE_UID_EXTRA: ["n1"]},
        "usages": USAGES,
        "request": encoded(request("node-a", KEY)),
        **changed,
    }


def signer(api: FakeApi, authority: Authority | None = None) -> Signer:
    return Signer(cast(Api, api), "podferry-system", authority or Authority.new())


def test_an_agents_request_is_for_its_node_and_its_key() -> None:
    name, key = signer(FakeApi(None, None)).judge(spec())
    assert name == "node-a"
    assert key == KEY.public_key()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"username": "system:serviceaccount:default:podferry-agent"}, "this user may have no"),
        ({"username": "kubernetes-admin"}, "this user may have no"),
        ({"extra": {}}, "not bound to a node"),
        ({"extra": {NODE_EXTRA: ["node-a", "node-b"]}}, "not bound to a node"),
        ({"extra": {NODE_EXTRA: ["node-b"]}}, "another node's name"),
        ({"usages": [*USAGES, "cert sign"]}, "more than an agent may have"),
        ({"request": "?"}, "cannot be read"),
        ({"request": encoded(b"nonsense")}, "cannot be read"),
        ({"request": asked_for("node-b", KEY)}, "another node's name"),
        ({"request": asked_for("node-a", rsa.generate_private_key(65537, 2048))}, "cannot be used"),
    ],
)
async def test_any_other_request_is_denied_with_the_reason(changed: Json, says: str) -> None:
    asked = {"metadata": {"name": "r"}, "spec": spec(**changed)}
    api = FakeApi(asked, node())
    with pytest.raises(Refused, match=says):
        signer(api).judge(asked["spec"])
    await signer(api).step("r")
    ((part, status),) = api.written
    (said,) = status["conditions"]
    assert (part, said["type"]) == ("approval", "Denied")
    assert says in said["message"]
    assert "certificate" not in status


async def test_a_signed_certificate_has_the_nodes_name_its_addresses_and_the_agents_key() -> None:
    authority = Authority.new()
    api = FakeApi({"metadata": {"name": "r"}, "spec": spec()}, node())
    await signer(api, authority).step("r")
    (approval, approved), (part, signed) = api.written
    assert (approval, part) == ("approval", "status")
    assert [one["type"] for one in approved["conditions"]] == ["Approved"]
    made = x509.load_pem_x509_certificate(base64.b64decode(signed["certificate"]))
    made.verify_directly_issued_by(authority.certificate)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-a"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "192.0.2.1"]
    assert made.public_key() == KEY.public_key()


@pytest.mark.parametrize("there", [None, node("another")])
async def test_an_agent_of_a_node_that_is_gone_or_was_made_anew_is_denied(there: Json | None) -> None:
    api = FakeApi({"metadata": {"name": "r"}, "spec": spec()}, there)
    await signer(api).step("r")
    ((_, status),) = api.written
    assert [one["type"] for one in status["conditions"]] == ["Denied"]


@pytest.mark.parametrize(
    "asked",
    [
        None,
        {"spec": spec(signerName="kubernetes.io/kubelet-serving")},
        {"spec": spec(), "status": {"certificate": "signed"}},
        {"spec": spec(), "status": {"conditions": [{"type": "Denied"}]}},
        {"spec": spec(), "status": {"conditions": [{"type": "Failed"}]}},
    ],
)
async def test_what_is_decided_or_is_another_signers_is_left_alone(asked: Json | None) -> None:
    api = FakeApi(asked, node())
    await signer(api).step("r")
    assert api.written == []


async def test_a_request_that_was_approved_and_not_signed_is_signed_and_not_approved_again() -> None:
    """The controller was killed between the two."""
    status = {"conditions": [{"type": "Approved"}]}
    api = FakeApi({"metadata": {"name": "r"}, "spec": spec(), "status": status}, node())
    await signer(api).step("r")
    ((part, signed),) = api.written
    assert part == "status"
    assert signed["conditions"] == status["conditions"]
    assert signed["certificate"]


class ObjectStore:
    """Secrets and ConfigMaps of one namespace. `faster` is what another controller makes just before `create`."""

    def __init__(self, *, faster: Json | None = None) -> None:
        self.objects: dict[str, Json] = {}
        self.written: list[str] = []
        self._faster = faster

    async def find(self, kind: Any, name: str, namespace: str) -> Json | None:
        assert namespace == "podferry-system"
        return self.objects.get(f"{kind.kind}/{name}")

    async def get(self, kind: Any, name: str, namespace: str) -> Json:
        return self.objects[f"{kind.kind}/{name}"]

    async def create(self, kind: Any, body: Json, namespace: str) -> Json:
        key = f"{kind.kind}/{body['metadata']['name']}"
        if self._faster is not None and kind.kind == "Secret":
            self.objects[key], self._faster = self._faster, None
        if key in self.objects:
            raise ObjectAlreadyExists(f"{key} is there already")
        self.written.append(f"create {key}")
        self.objects[key] = body
        return body

    async def replace(self, kind: Any, body: Json) -> Json:
        key = f"{kind.kind}/{body['metadata']['name']}"
        self.written.append(f"replace {key}")
        self.objects[key] = body
        return body


async def kept(store: ObjectStore) -> Authority:
    return await authority(cast(Api, store), "podferry-system")


def published(store: ObjectStore) -> list[x509.Certificate]:
    text: str = store.objects[f"ConfigMap/{BUNDLE}"]["data"]["ca.crt"]
    return x509.load_pem_x509_certificates(text.encode())


async def test_the_clusters_authority_is_made_once_and_published() -> None:
    store = ObjectStore()
    made = await kept(store)
    assert store.written == [f"create Secret/{SECRET}", f"create ConfigMap/{BUNDLE}"]
    assert published(store) == [made.certificate]
    again = await kept(store)
    assert again.certificate == made.certificate
    assert len(store.written) == 2, "nothing is written where all is as it should be"


async def test_the_authority_of_a_faster_controller_counts() -> None:
    other = Authority.new()
    certificate, key = other.to_pem()
    data = {"tls.crt": encoded(certificate), "tls.key": encoded(key)}
    store = ObjectStore(faster={"metadata": {"name": SECRET}, "data": data})
    assert (await kept(store)).certificate == other.certificate
    assert published(store) == [other.certificate]


async def test_a_new_authority_is_published_beside_the_one_whose_certificates_still_live() -> None:
    store = ObjectStore()
    former = await kept(store)
    del store.objects[f"Secret/{SECRET}"]
    current = await kept(store)
    assert published(store) == [current.certificate, former.certificate]
    assert store.written[-1] == f"replace ConfigMap/{BUNDLE}"


async def test_a_secret_that_holds_no_authority_is_an_error_and_is_not_overwritten() -> None:
    store = ObjectStore()
    store.objects[f"Secret/{SECRET}"] = {"data": {"tls.crt": encoded(b"no"), "tls.key": encoded(b"no")}}
    with pytest.raises(PodferryError, match=SECRET):
        await kept(store)
    assert store.written == []
