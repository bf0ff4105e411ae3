"""Data sets: read from the user's folder, checked, split, normalized and augmented."""

from dfs.data.augment import Augmentation
from dfs.data.dataset import DataSplits, Images, ImageSet, training_batch
from dfs.data.files import DataError
from dfs.data.load import AUTO, DATASETS, load_dataset, recognise
from dfs.data.preprocessing import Preprocessing

__all__ = [
    "AUTO",
    "DATASETS",
    "Augmentation",
    "DataError",
    "DataSplits",
    "ImageSet",
    "Images",
    "Preprocessing",
    "load_dataset",
    "recognise",
    "training_batch",
]
