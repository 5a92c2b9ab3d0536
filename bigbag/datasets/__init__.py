"""Named data sets with torchmil's names, for a ``DataLoader`` and for packing; generators; the hub."""

from bigbag import torchmil_files
from bigbag.datasets.algorithmic import FalseFrequencyMILDataset, MCStandardMILDataset, SCStandardMILDataset
from bigbag.datasets.base import MILDataset, SourceDataset
from bigbag.datasets.binary import BinaryClassificationDataset
from bigbag.datasets.hgsc import HGSC
from bigbag.datasets.hub import download
from bigbag.datasets.mnist import MNISTBags
from bigbag.datasets.processed import ProcessedMILDataset, default_read_file
from bigbag.datasets.registry import SOURCES, open_source, recognise
from bigbag.datasets.sequences import CTScanDataset, RSNAMILDataset, TADMILDataset, VideoClassificationDataset
from bigbag.datasets.shifted_mean import ShiftedMeanMILDataset
from bigbag.datasets.slides import CAMELYON16MILDataset, PANDAMILDataset, WSIDataset
from bigbag.datasets.toy import ToyDataset
from bigbag.datasets.trident import TridentWSIDataset

__all__ = [
    "HGSC",
    "SOURCES",
    "BinaryClassificationDataset",
    "CAMELYON16MILDataset",
    "CTScanDataset",
    "FalseFrequencyMILDataset",
    "MCStandardMILDataset",
    "MILDataset",
    "MNISTBags",
    "PANDAMILDataset",
    "ProcessedMILDataset",
    "RSNAMILDataset",
    "SCStandardMILDataset",
    "ShiftedMeanMILDataset",
    "SourceDataset",
    "TADMILDataset",
    "ToyDataset",
    "TridentWSIDataset",
    "VideoClassificationDataset",
    "WSIDataset",
    "default_read_file",
    "download",
    "open_source",
    "recognise",
]

torchmil_files.attach(__name__)
