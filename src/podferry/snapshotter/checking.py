"""Reading layers back whole, against the digests that they were published with.

A node that uses a layer looks at its size and its first bytes only: reading all of it would take as long as a pull. So this is
for a person, or a timer, on any node that may write to the share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from podferry.snapshotter import layout
from podferry.snapshotter.erofs import ErofsForm
from podferry.snapshotter.faults import LayerDamaged
from podferry.snapshotter.layer_ports import Form, Share
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.store import set_aside
from podferry.snapshotter.tree import TreeForm


@dataclass(frozen=True)
class CheckedLayer:
    """What reading one layer showed. `wrong` is empty for a whole one; one that is not lies at `aside` on the share now.

    `bytes` is 0 and `form` empty where not even its record could be read.
    """

    chain: str
    form: str
    bytes: int
    wrong: str = ""
    aside: str = ""


def check_layers(share: PosixShare) -> Iterator[CheckedLayer]:
    """Check every layer, one after the other; a damaged one is set aside, so that the next pull makes it again.

    What runs from a damaged layer runs on as before. Raises the errors of a share that does not answer or takes no writes.
    """
    forms: dict[FormName, Form] = {FormName.DIR: TreeForm(share), FormName.EROFS: ErofsForm(share, Path())}
    for name in share.names(layout.LAYERS):
        chain = layout.chain_of(name)
        found = None if chain is None else _checked(share, forms, chain)
        if found is not None:
            yield found


def _checked(share: Share, forms: Mapping[FormName, Form], chain: str) -> CheckedLayer | None:
    """None for a layer that was removed, or made again, while it was read."""
    at = f"{layout.LAYERS}/{layout.name_of(chain)}"
    raw, record = b"", None
    try:
        raw = share.read(f"{at}/{layout.RECORD}")
        record = layout.decode_layer(chain, raw)
        _check(forms[record.form], at, record)
    except FileNotFoundError:
        return None
    except LayerDamaged as damaged:
        try:
            same = share.read(f"{at}/{layout.RECORD}") == raw
        except FileNotFoundError:
            return None
        aside = set_aside(share, chain) if same else None
        if aside is None:
            return None
        form, size = (record.form.value, record.bytes) if record else ("", 0)
        return CheckedLayer(chain, form, size, damaged.why, aside)
    return CheckedLayer(chain, record.form.value, record.bytes)


def _check(form: Form, at: str, record: LayerRecord) -> None:
    try:
        form.check(at, record)
    except FileNotFoundError as gone:
        raise LayerDamaged(f"layer {record.chain} is damaged", why="its files are missing") from gone
