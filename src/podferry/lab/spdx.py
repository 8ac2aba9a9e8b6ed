"""What an image is made of, as a list in SPDX 2.3 (JSON): Debian's packages, Python's, and what comes from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

PLACE = "usr/share/podferry/podferry.spdx.json"
"""Where the list is in the image."""


@dataclass(frozen=True, order=True)
class Package:
    """A package: its kind is that of package URLs (`deb`, `pypi`, `generic`)."""

    kind: str
    name: str
    version: str
    architecture: str = ""

    @property
    def url(self) -> str:
        """Its package URL, see github.com/package-url/purl-spec."""
        space, more = ("debian/", f"?arch={self.architecture}") if self.kind == "deb" else ("", "")
        return f"pkg:{self.kind}/{space}{quote(self.name, safe='')}@{quote(self.version, safe='')}{more}"


def of_debian(status: str) -> list[Package]:
    """The installed packages that a database of dpkg's lists."""
    found = []
    for stanza in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found.append(Package("deb", fields["Package"], fields["Version"], fields["Architecture"]))
    return sorted(found)


def of_python(site: Path) -> list[Package]:
    """The Python packages in a directory that pip installed into."""
    return sorted(Package("pypi", one.name.lower(), one.version) for one in distributions(path=[str(site)]))


def document(name: str, version: str, packages: Iterable[Package], *, created: datetime) -> dict[str, Any]:
    """The list for the image `name` in this version. Equal lists of one time are equal."""
    listed = sorted(set(packages))
    digest = hashlib.sha256("\n".join(one.url for one in listed).encode()).hexdigest()
    described = [
        {
            "SPDXID": f"SPDXRef-Package-{number}",
            "name": one.name,
            "versionInfo": one.version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "externalRefs": [
                {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": one.url}
            ],
        }
        for number, one in enumerate(listed)
    ]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name}:{version}",
        "documentNamespace": f"https://spdx.org/spdxdocs/{quote(name, safe='')}-{quote(version, safe='')}-{digest[:32]}",
        "creationInfo": {
            "created": created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": [f"Tool: podferry-{version}"],
        },
        "packages": described,
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": one["SPDXID"],
            }
            for one in described
        ],
    }


def write(root: Path, of: dict[str, Any]) -> None:
    """Put a list into the tree of an image."""
    path = root / PLACE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(of, indent=1, sort_keys=True) + "\n")
