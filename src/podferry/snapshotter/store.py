"""Layers on the share: found, made by one node, published whole.

A layer is made in a private directory under `staging/`, read back and checked, and then renamed to its place. That
rename is the only way a layer appears, and a directory with entries is never replaced, so whatever is seen under
`layers/` is complete and stays as it is. Anything that is to be deleted is first renamed out of reach for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from podferry.errors import PodferryError
from podferry.snapshotter import layout
from podferry.snapshotter.faults import LayerDamaged, LayerMissing, ShareUnavailable
from podferry.snapshotter.layer_ports import Clock, Form, KeptDigests, Share
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.leases import Lease, Leases, Taken
from podferry.snapshotter.references import References


@dataclass(frozen=True)
class Layer:
    """A published layer: `at` is its directory on the share."""

    record: LayerRecord
    at: str


class LayerStore:
    """One node's access to the layers of a share. `form` is how this node publishes; it reads every form in `forms`."""

    def __init__(
        self,
        share: Share,
        clock: Clock,
        references: References,
        leases: Leases,
        *,
        forms: Mapping[FormName, Form],
        form: FormName,
        read_only: bool = False,
        kept: KeptDigests | None = None,
    ) -> None:
        self.share = share
        self.clock = clock
        self.references = references
        self.leases = leases
        self.forms = forms
        self.form = form
        self.read_only = read_only
        self.kept = kept

    def find(self, chain: str) -> Layer | None:
        """The published layer, referred to from now on; None when there is none.

        One that is visibly damaged is set aside and counts as not there. None may also mean "not seen yet".
        """
        layer = self._look(chain)
        if layer is None or self.read_only or self.references.holds(chain):
            return layer
        self._refer(chain)
        layer = self._look(chain)  # again: only what is seen after the reference was written is safe from the collector
        if layer is None:
            self.references.drop(chain)
        return layer

    def need(self, chain: str) -> Layer:
        """The layer, which this node's images refer to. Raises `LayerMissing` when it is gone."""
        layer = self.find(chain)
        if layer is None:
            raise LayerMissing(
                f"layer {chain} is not on the share",
                why="it failed its check and was set aside, or somebody removed it",
                remedy="remove the image from this node and pull it again: crictl rmi IMAGE; crictl pull IMAGE",
            )
        self.keep(layer)
        return layer

    def keep(self, layer: Layer) -> None:
        """The node uses this layer from now on, and takes no other one for it."""
        if self.kept is not None:
            self.kept.keep(layer.record)

    def look(self, chain: str) -> Layer | None:
        """The published layer as it is now. Raises `LayerExchanged`, and `LayerDamaged` for what is no layer."""
        try:
            return self._open(chain)
        except FileNotFoundError:
            return None

    def claim(self, chain: str) -> Layer | Lease | Taken:
        """What to do for a layer: use it, make it (the lease is ours), or wait (and ask again)."""
        found = self.find(chain)
        if found is not None:
            return found
        lease = self.leases.take(layout.name_of(chain))
        if isinstance(lease, Lease):
            self.share.refresh(layout.LAYERS)
            found = self.find(chain)  # published between the look and the lease
            if found is not None:
                self.leases.release(lease)
                return found
        return lease

    def publish(self, chain: str, source: Path) -> Layer:
        """Put the files under `source` on the share as the layer `chain`; what another node published first stands.

        Whatever happens, no half layer is ever seen under `layers/`, and a second call may simply try again.
        """
        found = self.find(chain)
        if found is not None:
            return found
        form = self.forms[self.form]
        name, token = layout.name_of(chain), layout.new_token()
        stage = f"{layout.STAGING}/{name}.{token}"
        try:
            with suppress(FileExistsError):  # nobody else has our token: it is ours, and the reply was lost
                self.share.make(stage)
            payload = form.write(source, stage)
            record = LayerRecord(
                chain=chain,
                form=form.name,
                digest=payload.digest,
                bytes=payload.bytes,
                inodes=payload.inodes,
                node=self.references.node,
                token=token,
                created=self.clock.wall(),
            )
            form.check(stage, record)
            self.share.replace(f"{stage}/{layout.RECORD}", layout.encode(record))
            self._refer(chain)
            with suppress(FileExistsError, FileNotFoundError):  # another was first; or ours was, and the reply was lost
                self.share.rename(stage, f"{layout.LAYERS}/{name}")
                self.keep(Layer(record, f"{layout.LAYERS}/{name}"))  # as it was written, and not as it is read back
        except FileNotFoundError as gone:
            raise ShareUnavailable(f"cannot publish layer {chain}", why=f"{gone.filename or stage} is gone") from gone
        except BaseException:
            with suppress(PodferryError):
                self.discard(stage)
            raise
        self.discard(stage)
        return self.need(chain)

    def discard(self, stage: str) -> None:
        """Remove what was staged: out of reach of a publishing rename that may still be on its way, then gone."""
        doomed = f"{layout.DOOMED}/{stage.rpartition('/')[2]}"
        try:
            self.share.rename(stage, doomed)
        except FileNotFoundError:
            return
        self.share.remove_tree(doomed)

    def check(self, layer: Layer) -> None:
        """Read a whole layer back. One that fails is set aside, and `LayerDamaged` raised."""
        try:
            self._form(layer.record).check(layer.at, layer.record)
        except LayerDamaged:
            self.set_aside(layer.record.chain)
            raise

    def set_aside(self, chain: str) -> str | None:
        """Take a damaged layer out of use, so that the next node that needs it makes it again; where it went."""
        return None if self.read_only else set_aside(self.share, chain)

    def _refer(self, chain: str) -> None:
        if not self.read_only:
            self.references.add(chain)

    def _look(self, chain: str) -> Layer | None:
        try:
            return self._open(chain)
        except FileNotFoundError:
            if self.read_only or not self._restore(chain):
                return None
        except LayerDamaged:
            if self.read_only:
                raise
            self.set_aside(chain)
            return None
        try:
            return self._open(chain)
        except FileNotFoundError:
            return None

    def _open(self, chain: str) -> Layer:
        at = f"{layout.LAYERS}/{layout.name_of(chain)}"
        record = layout.decode_layer(chain, self.share.read(f"{at}/{layout.RECORD}"))
        if self.kept is not None:
            self.kept.demand(record)
        try:
            self._form(record).glance(at, record)
        except FileNotFoundError as gone:
            again = layout.decode_layer(chain, self.share.read(f"{at}/{layout.RECORD}"))
            if again.token == record.token:  # or else it was moved while we looked
                raise LayerDamaged(f"layer {chain} is damaged", why="its files are missing") from gone
            raise
        return Layer(record, at)

    def _form(self, record: LayerRecord) -> Form:
        form = self.forms.get(record.form)
        if form is None:
            raise LayerDamaged(f"layer {record.chain} has a form that this node cannot read", why=record.form)
        return form

    def _restore(self, chain: str) -> bool:
        """Bring a condemned layer back, if there is one."""
        name = layout.name_of(chain)
        restored = False
        for entry in self.share.names(layout.TRASH):
            if layout.chain_of(entry) == chain:
                with suppress(FileExistsError, FileNotFoundError):
                    self.share.rename(f"{layout.TRASH}/{entry}", f"{layout.LAYERS}/{name}")
                restored = True
        return restored


def set_aside(share: Share, chain: str) -> str | None:
    """Take a layer out of use and keep what is there of it; where that is now, None when there was nothing."""
    name = layout.name_of(chain)
    aside = f"{layout.DAMAGED}/{name}.{layout.new_token()}"
    try:
        share.rename(f"{layout.LAYERS}/{name}", aside)
    except FileNotFoundError:
        return None
    return aside
