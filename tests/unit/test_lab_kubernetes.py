"""What a lab's Kubernetes is told, without starting any of it."""

from __future__ import annotations

import json
import tomllib
from base64 import b64decode
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtensionOID, NameOID

from podferry.errors import Refused, UsageError
from podferry.lab import machine_config, state
from podferry.lab.kubernetes import certificates, crio_package, daemons, pod_network

pytestmark = pytest.mark.unit
ADDRESSES = state.addresses("default", ["node-a", "node-b"], control=True)


def test_without_the_programs_it_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "DIRECTORY", tmp_path)
    (tmp_path / "kubelet").touch(mode=0o755)
    (tmp_path / "kubectl").touch(mode=0o644)
    with pytest.raises(Refused) as refused:
        daemons.directory()
    assert refused.value.why == f"{tmp_path} lacks kube-apiserver, kube-controller-manager, kube-scheduler, kubectl"
    assert "PODFERRY_KUBE_BIN" in refused.value.remedy
    for name in daemons.DAEMONS:
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o755)
    assert daemons.directory() == tmp_path


def test_certificates_name_those_whom_kubernetes_expects(tmp_path: Path) -> None:
    certificates.issue(tmp_path, ADDRESSES)
    admin = certificate(tmp_path / "kubeconfig")
    assert subject(admin) == ("system:masters", "kubernetes-admin")
    control = tmp_path / "machines" / "control" / "etc" / "kubernetes"
    assert subject(certificate(control / "kube-scheduler.kubeconfig")) == (None, "system:kube-scheduler")
    node = tmp_path / "machines" / "node-b" / "etc" / "kubernetes"
    assert subject(certificate(node / "kubelet.kubeconfig")) == ("system:nodes", "system:node:node-b")
    server = x509.load_pem_x509_certificate((control / "apiserver.crt").read_bytes())
    names = server.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    assert isinstance(names, x509.SubjectAlternativeName)
    known = {str(one) for one in names.get_values_for_type(x509.IPAddress)}
    assert known == {ADDRESSES["control"], pod_network.API_SERVICE, "127.0.0.1"}
    authority = x509.load_pem_x509_certificate((node / "ca.crt").read_bytes())
    for one in (admin, server):
        one.verify_directly_issued_by(authority)
    for key in tmp_path.rglob("*.key"):
        assert key.stat().st_mode & 0o077 == 0


def test_a_lab_that_grows_keeps_its_certificates(tmp_path: Path) -> None:
    certificates.issue(tmp_path, ADDRESSES)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    certificates.issue(tmp_path, state.addresses("default", ["node-a", "node-b", "node-c"], control=True))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.parents[2].name for path in after.keys() - before.keys()} == {"node-c"}


def test_every_node_has_pods_of_its_own() -> None:
    subnets = {
        json.loads(machine_config.for_machine("default", name, ADDRESSES)["cni/10-lab.conflist"])["plugins"][0]["ipam"][
            "ranges"
        ][0][0]["subnet"]
        for name in ("node-a", "node-b")
    }
    assert subnets == {"10.240.11.0/24", "10.240.12.0/24"}


@pytest.mark.parametrize(("major", "table"), [(1, "io.containerd.grpc.v1.cri"), (2, "io.containerd.cri.v1.runtime")])
def test_in_a_cluster_podferrys_runtime_is_the_installers_to_add(major: int, table: str) -> None:
    alone = tomllib.loads(machine_config.containerd(major))["plugins"][table]["containerd"]["runtimes"]
    inside = tomllib.loads(machine_config.containerd(major, kubernetes=True))["plugins"][table]["containerd"][
        "runtimes"
    ]
    assert set(alone) == {"runc", "podferry"}
    assert set(inside) == {"runc"}


def test_a_nodes_containerd_keeps_what_was_installed(tmp_path: Path) -> None:
    files = machine_config.for_machine("default", "node-a", ADDRESSES)
    assert machine_config.write(files, tmp_path, keep={"containerd.toml"})
    (tmp_path / "containerd.toml").write_text("imports = []\n")
    assert not machine_config.write(files, tmp_path, keep={"containerd.toml"})
    assert (tmp_path / "containerd.toml").read_text() == "imports = []\n"
    assert machine_config.write(files, tmp_path)


def certificate(kubeconfig: Path) -> x509.Certificate:
    user = json.loads(kubeconfig.read_text())["users"][0]["user"]
    return x509.load_pem_x509_certificate(b64decode(user["client-certificate-data"]))


def subject(one: x509.Certificate) -> tuple[object, object]:
    def value(oid: x509.ObjectIdentifier) -> object:
        found = one.subject.get_attributes_for_oid(oid)
        return found[0].value if found else None

    return value(NameOID.ORGANIZATION_NAME), value(NameOID.COMMON_NAME)


def test_nodes_with_crio_have_its_configuration_and_their_kubelets_its_socket() -> None:
    files = machine_config.for_machine("x", "node-a", ADDRESSES, runtime=state.CRIO)
    told = tomllib.loads(files["crio.conf"])["crio"]
    assert "containerd.toml" not in files
    assert json.loads(files["kubernetes/kubelet.json"])["containerRuntimeEndpoint"] == f"unix://{told['api']['listen']}"
    assert "podferry" not in told["runtime"]["runtimes"], "an installation adds it"


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("containerd", ["containerd"] * 3),
        ("crio", ["crio"] * 3),
        ("containerd,crio", ["containerd", "crio", "crio"]),
        ("crio,containerd,crio", ["crio", "containerd", "crio"]),
    ],
)
def test_which_node_has_which_runtime(named: str, found: list[str]) -> None:
    assert [state.runtime_of(node, named) for node in state.node_names(3)] == found
    with pytest.raises(UsageError, match="no container runtime"):
        state.runtime_of("node-a", f"{named},docker")


def test_without_crios_programs_a_lab_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crio_package, "DIRECTORY", tmp_path)
    (tmp_path / "conmon").write_text("")
    (tmp_path / "conmon").chmod(0o755)
    with pytest.raises(Refused, match="no CRI-O") as refused:
        crio_package.directory()
    assert "crio, pinns" in refused.value.why
    assert "PODFERRY_CRIO_BIN" in refused.value.remedy
