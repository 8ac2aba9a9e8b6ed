"""Images that people build for a lab: Debian packages as an OCI archive, made without a daemon and without a registry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from podferry.errors import UsageError
from podferry.lab import oci, registry
from podferry.lab.build_cache import remove
from podferry.lab.debian import SUITE, architecture, bootstrap, essential_files
from podferry.lab.machine_config import REGISTRY
from podferry.lab.progress import Progress
from podferry.lab.state import CACHE, STATE, locked

IMAGES = STATE / "images"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Recipe:
    """What an image is made of: `packages` of Debian, with `command` and `env` as its defaults."""

    reference: str
    packages: Sequence[str]
    command: Sequence[str] = ("bash",)
    env: Mapping[str, str] = field(default_factory=dict)


def build(recipe: Recipe, progress: Progress) -> Path:
    """The archive of the image: two layers, Debian's essential packages and everything else; gigabytes take minutes.

    What was built with the same recipe before is taken as it is; another image of that name is replaced. Raises `Refused`
    and `CommandFailed`, for a package that does not exist for example.
    """
    path = archive_of(recipe.reference)
    made_by = path.with_suffix(".json")
    wanted = json.dumps(asdict(recipe) | {"suite": SUITE, "arch": architecture()}, sort_keys=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if path.exists() and made_by.exists() and made_by.read_text() == wanted:
            return path
        root, partial = path.with_suffix(".root"), path.with_suffix(".partial")
        for leftover in (root, partial):
            remove(leftover)
        try:
            bootstrap(list(recipe.packages), root, CACHE / "debs", lambda step: progress(f"{recipe.reference}: {step}"))
            progress(f"{recipe.reference}: packing")
            oci.write_archive(
                root,
                partial,
                reference=recipe.reference,
                architecture=architecture(),
                command=recipe.command,
                env=[f"{name}={value}" for name, value in ({"PATH": PATH} | dict(recipe.env)).items()],
                lower=essential_files(root),
            )
            made_by.unlink(missing_ok=True)  # a recipe never stands beside another's image
            partial.rename(path)
            made_by.write_text(wanted)
        finally:
            remove(root)
            remove(partial)
    return path


def built() -> dict[str, Path]:
    """The archives of all images that were built here, by reference."""
    return {str(json.loads(path.read_text())["reference"]): path.with_suffix(".tar") for path in IMAGES.glob("*.json")}


def find(reference: str) -> Path:
    """The archive of an image that was built here. Raises `UsageError` where there is none."""
    path = archive_of(reference)
    if not path.exists():
        name = reference.removeprefix(f"{REGISTRY}/").removesuffix(":latest")
        raise UsageError(
            f"no image {reference} was built here", remedy=f"podferry lab image build {name} --packages PACKAGE,..."
        )
    return path


def archive_of(reference: str) -> Path:
    """Where the archive of an image lies, or would lie."""
    return IMAGES / (registry.path_of(reference).replace("/", "+").replace(":", "@") + ".tar")
