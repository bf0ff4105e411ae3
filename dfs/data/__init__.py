"""Data sets, split and normalized."""

from dfs.data.dataset import DataSplits, ImageSet, load_dataset

__all__ = ["DataSplits", "ImageSet", "load_dataset"]
