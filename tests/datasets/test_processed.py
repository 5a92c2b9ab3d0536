"""Data sets of files, beside torchmil on the same files."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import bigbag.datasets as ours
from bigbag.data import collate_fn
from bigbag.models import SmABMIL
from bigbag.utils import Trainer

torchmil = pytest.importorskip("torchmil")
theirs = pytest.importorskip("torchmil.datasets")
h5py = pytest.importorskip("h5py")


def paths_of(folders, **names):
    return {names.get(kind, f"{kind}_path"): str(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("name", ["ProcessedMILDataset", "BinaryClassificationDataset"])
@pytest.mark.parametrize("kwargs", [{}, {"adj_with_dist": True}, {"norm_adj": False}, {"dist_thr": 1024.0}])
def test_folders_like_torchmil(name, kwargs, folders, assert_same_bags):
    keep = ["c", "d", "slide.with.dots"] if kwargs.get("norm_adj") is False else None  # torchmil can't build "b" then
    kwargs = {"dist_thr": 750.0, "bag_names": keep, "verbose": False, **kwargs, **paths_of(folders)}
    mine, other = getattr(ours, name)(**kwargs), getattr(theirs, name)(**kwargs)
    assert mine.bag_names == other.bag_names
    assert_same_bags(mine, other)
    assert sum(bag["adj"]._nnz() for bag in mine) > 20
    np.testing.assert_equal(mine.get_bag_labels(), other.get_bag_labels())


@pytest.mark.parametrize("name", ["CAMELYON16MILDataset", "PANDAMILDataset"])
@pytest.mark.parametrize("partition", ["train", "test"])
def test_slides_like_torchmil(name, partition, slides_root, assert_same_bags):
    kwargs = {"root": str(slides_root), "partition": partition, "adj_with_dist": partition == "test"}
    mine = getattr(ours, name)(**kwargs)
    assert_same_bags(mine, getattr(theirs, name)(**kwargs))
    assert mine[1]["coords"].amin(0).tolist() == [0, 0] and mine[1]["coords"].max() <= 5


@pytest.mark.parametrize("name", ["RSNAMILDataset", "TADMILDataset"])
@pytest.mark.parametrize("bag_keys", [["X", "Y", "y_inst", "adj", "coords"], ["X", "Y", "coords"]])
def test_sequences_like_torchmil(name, bag_keys, sequences_root, assert_same_bags):
    kwargs = {"root": str(sequences_root), "partition": "test", "bag_keys": bag_keys}
    assert_same_bags(getattr(ours, name)(**kwargs), getattr(theirs, name)(**kwargs))


@pytest.mark.parametrize("name, prefix", [("CTScanDataset", "slice"), ("VideoClassificationDataset", "frame")])
def test_scans_and_videos_like_torchmil(name, prefix, folders, assert_same_bags):
    paths = paths_of(folders, inst_labels=f"{prefix}_labels_path")
    del paths["coords_path"]
    assert_same_bags(getattr(ours, name)(**paths), getattr(theirs, name)(**paths))


def test_wsi_dataset_is_camelyons_lattice(folders, slides_root, assert_same_bags):
    names = ["c", "d"]
    paths = paths_of(folders, inst_labels="patch_labels_path")
    keys = ["X", "coords", "adj"]
    assert_same_bags(
        ours.WSIDataset(**paths, wsi_names=names, bag_keys=keys),
        theirs.CAMELYON16MILDataset(str(slides_root), partition="test", bag_keys=keys),
    )


def test_places_of_a_patch_size_that_no_float_divides_exactly(folders):
    """torchmil truncates (c / 100) - (min / 100), which for some columns is one less than the column."""
    columns = np.arange(60) * 100 + 30
    np.save(folders["coords"] / "c.npy", np.stack([columns, 0 * columns], 1))
    dataset = ours.WSIDataset(
        **paths_of(folders, inst_labels="patch_labels_path"), wsi_names=["c"], patch_size=100, bag_keys=["coords"]
    )
    assert dataset[0]["coords"][:, 0].tolist() == list(range(60))


def test_binary_inst_labels(folders):
    paths = {**paths_of(folders), "bag_keys": ["X", "Y", "y_inst"], "load_at_init": False}
    np.save(folders["inst_labels"] / "d.npy", np.ones(17))  # against the bag's label 0
    dataset = ours.BinaryClassificationDataset(**paths)
    with pytest.warns(UserWarning, match=r"max\(y_inst\)=1.*Y=0.*bag d"):
        assert dataset[dataset.bag_names.index("d")]["y_inst"].tolist() == [-1] * 17
    del paths["inst_labels_path"]
    unknown = ours.BinaryClassificationDataset(**paths, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: set(bag["y_inst"].tolist()) for name, bag in zip(unknown.bag_names, unknown)}
    assert found == {"b": {0}, "d": {0}, "c": {-1}, "slide.with.dots": {-1}}
    assert unknown[0]["Y"].shape == () and unknown[0]["y_inst"].shape == (1,)


def test_h5_folders_and_own_reader(folders, assert_same_bags):
    """Instance labels too; torchmil reads them in this release, and did not in earlier ones."""
    for kind, folder in folders.items():
        for file in list(folder.glob("*.npy")):
            with h5py.File(file.with_suffix(".h5"), "w") as h5:
                h5[kind] = np.load(file)
    kwargs = {**paths_of(folders), "dist_thr": 800}
    mine = ours.ProcessedMILDataset(**kwargs, file_ext=".h5")
    assert_same_bags(mine, theirs.ProcessedMILDataset(**kwargs, file_ext=".h5"))
    doubled = ours.ProcessedMILDataset(**kwargs, read_file_fn=lambda path, kind: np.load(path) * 2)
    assert torch.equal(doubled[1]["X"], 2 * mine[1]["X"])


def test_collate_functions_go_with_both(folders):
    kwargs = {**paths_of(folders), "dist_thr": 750.0, "bag_keys": ["X", "y_inst", "adj", "coords", "Y"]}
    mine, other = ours.ProcessedMILDataset(**kwargs), theirs.ProcessedMILDataset(**kwargs)
    expected = torchmil.data.collate_fn([other[i] for i in range(4)])
    for collate, dataset in [(torchmil.data.collate_fn, mine), (collate_fn, mine), (collate_fn, other)]:
        (batch,) = DataLoader(dataset, batch_size=4, collate_fn=collate)
        assert set(batch.keys()) == set(expected.keys())
        for key in batch.keys():  # noqa: SIM118
            a, b = (value.to_dense().double() if value.is_sparse else value for value in (batch[key], expected[key]))
            torch.testing.assert_close(a, b, check_dtype=False)


def test_models_of_torchmil_take_the_graph(slides_root):
    """Of torchmil's own data set they refuse it, since it is float64."""
    model = torchmil.models.SmABMIL(in_shape=(6,), att_dim=4)
    batch = torchmil.data.collate_fn(list(ours.CAMELYON16MILDataset(slides_root, partition="test")))
    assert batch["adj"].dtype == torch.float32
    assert model(batch["X"], batch["adj"], batch["mask"]).shape == (2,)
    with pytest.raises(RuntimeError, match="Double"):
        batch = torchmil.data.collate_fn(list(theirs.CAMELYON16MILDataset(str(slides_root), partition="test")))
        model(batch["X"], batch["adj"], batch["mask"])


def test_trainer_learns_from_a_loader(slides_root):
    torch.manual_seed(0)
    loader = partial(DataLoader, batch_size=2, collate_fn=collate_fn, num_workers=0)
    train = ours.CAMELYON16MILDataset(slides_root)
    model = SmABMIL(in_shape=(6,), att_dim=4)
    trainer = Trainer(
        model, torch.optim.Adam(model.parameters(), 0.05), device="cpu", obj_metric="loss", obj_metric_mode="min",
        disable_pbar=True, verbose=False,
    )  # fmt: skip
    trainer.train(30, loader(train))
    assert trainer.best_obj_metric < 0.1


def test_errors_name_the_file_and_the_bag(folders):
    paths = paths_of(folders)
    dataset = ours.ProcessedMILDataset(**paths)
    (folders["labels"] / "b.npy").unlink()
    with pytest.raises(ValueError, match=r"labels/b\.npy: the labels of a bag can't be read: no such file"):
        dataset[0]
    np.save(folders["coords"] / "c.npy", np.zeros((5, 2)))
    with pytest.raises(ValueError, match="bag 'c': X 23, y_inst 23, coords 5: expected the same number"):
        dataset[1]
    (folders["features"] / "d.npy").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match=r"features/d\.npy"):
        dataset[2]
    with pytest.raises(IndexError, match="out of range"):
        dataset[4]
    with pytest.raises(ValueError, match="holds 'Z', expected some of X, Y"):
        ours.ProcessedMILDataset(**paths, bag_keys=["X", "Z"])
    del paths["coords_path"]
    with pytest.raises(ValueError, match="coords_path must be provided if 'adj'"):
        ours.ProcessedMILDataset(**paths)


def test_splits_csv(slides_root):
    features = slides_root / "patches_512/features/features_UNI"
    (features / "d.npy").unlink()
    dataset = ours.CAMELYON16MILDataset(slides_root, partition="test")
    assert dataset.bag_names == ["c"]
    assert [item["name"] for item in dataset.left_out] == ["d"]
    with pytest.raises(ValueError, match="no bag is in 'valid', expected one of train, test"):
        ours.CAMELYON16MILDataset(slides_root, partition="valid")
    with open(slides_root / "splits.csv", "a") as file:
        file.write("c,train\n")
    assert ours.CAMELYON16MILDataset(slides_root).bag_names == ["b", "c", "slide.with.dots"]
    with pytest.raises(ValueError, match="line 6: bag 'c' is in test and in train"):
        ours.CAMELYON16MILDataset(slides_root, partition=None)


def test_subclasses_add_to_what_a_bag_holds(folders, assert_same_bags):
    def own(base):
        class Own(base):
            def _load_bag(self, name):
                bag = super()._load_bag(name)
                return {**bag, "order": np.arange(len(bag["X"]))}

            def _build_bag(self, name):
                bag = super()._build_bag(name)
                return {**bag, "centre": bag["X"].mean(0)}

        return Own(**paths_of(folders), bag_keys=["X", "Y", "order", "centre"])

    mine, other = own(ours.ProcessedMILDataset), own(theirs.ProcessedMILDataset)
    assert set(mine[0].keys()) == {"X", "Y", "order", "centre"}
    assert_same_bags(mine, other)
    assert mine.load(mine.entries()[0]).num_instances == len(mine[0]["X"]) and mine.description()


def test_an_empty_bag_has_an_empty_graph(folders):
    for kind, shape in (("features", (0, 6)), ("coords", (0, 2)), ("inst_labels", (0,))):
        np.save(folders[kind] / "c.npy", np.zeros(shape, np.float32))
    bag = ours.ProcessedMILDataset(**paths_of(folders), bag_names=["c"], adj_with_dist=True)[0]
    assert bag["X"].shape == (0, 6) and bag["adj"].shape == (0, 0)
