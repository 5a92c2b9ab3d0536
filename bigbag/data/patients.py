"""All slides of a patient as one bag."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from bigbag.bags import Bag
from bigbag.data.join import join_bags
from bigbag.data.manifest import BagInfo, make_keys
from bigbag.data.stores import BagStore


class PatientStore(BagStore):
    """The bags of ``store``, those of one patient joined to one bag named after the patient.

    A bag without a patient stays what it is. The instances of a patient follow each other slide by slide, in the order
    of the slides in ``store``; see :func:`bigbag.data.join.join_bags`. Nothing is copied for a patient of one slide.

    Args:
        store: the slides.

    Raises:
        ValueError: slides of one patient with different labels or in different splits, or a patient called like a bag
            that has no patient.
    """

    def __init__(self, store: BagStore) -> None:
        self.store = store
        members: dict[tuple[bool, str], list[int]] = {}
        for index, info in enumerate(store.infos):
            name = info.name if info.patient is None else info.patient
            members.setdefault((info.patient is not None, name), []).append(index)
        names = [name for _, name in members]
        if len(set(names)) != len(names):
            twice = next(name for _, name in members if names.count(name) > 1)
            raise ValueError(f"{twice!r} is a patient and also a bag without a patient: rename one of them")
        self.slides = tuple(tuple(indices) for indices in members.values())
        self.infos = tuple(
            self._joined(name, key, [store.infos[i] for i in indices])
            for (_, name), key, indices in zip(members, make_keys(names), self.slides)
        )
        self.feature_shape = store.feature_shape
        self.feature_dtype = store.feature_dtype
        self.patch_shape = store.patch_shape
        self.description = store.description
        self.left_out = store.left_out
        self.fields = store.fields
        self.graph = store.graph

    @staticmethod
    def _joined(name: str, key: str, infos: list[BagInfo]) -> BagInfo:
        for field in ("label", "split"):
            values = {repr(getattr(info, field)): info.name for info in infos}
            if len(values) > 1:
                listed = ", ".join(f"{value} ({of})" for value, of in values.items())
                raise ValueError(
                    f"patient {name!r}: slides with different {field}s, {listed}: as one bag (data.bag: patient) they "
                    f"need one {field}; correct them, or take every slide as a bag"
                )
        return replace(infos[0], name=name, key=key, num_instances=sum(info.num_instances for info in infos))

    def read(self, index: int) -> Bag:
        info = self.infos[index]
        return join_bags([self.store.read(slide) for slide in self.slides[index]], key=info.name, y=info.label)

    def digest(self) -> str:
        return hashlib.sha256(f"patients of {self.store.digest()}".encode()).hexdigest()
