"""Labelled images by name, in three splits: training, calibration, test.

Images are float32 [C, H, W] in [-1, 1], labels are Python ints. `load_data` knows the files of a
folder, their labels and their split; it decodes an image when its item is read.
"""

from .datasets import (
    DataSplits,
    FolderImages,
    ImageDataset,
    LabelledImages,
    SourceImages,
    as_tensors,
    batches,
)
from .digits import DIGITS_CALIBRATION, DIGITS_TEST
from .folders import Skipped, image_files
from .images import FORMATS, image_to_tensor, open_image, upright_size
from .loading import DEFAULT_IMAGE_SIZE, load_data
from .record import DataRecord, check_class_names
from .splitting import CALIBRATION_FRACTION, TEST_FRACTION, few_labels

__all__ = [
    "CALIBRATION_FRACTION",
    "DEFAULT_IMAGE_SIZE",
    "DIGITS_CALIBRATION",
    "DIGITS_TEST",
    "FORMATS",
    "TEST_FRACTION",
    "DataRecord",
    "DataSplits",
    "FolderImages",
    "ImageDataset",
    "LabelledImages",
    "Skipped",
    "SourceImages",
    "as_tensors",
    "batches",
    "check_class_names",
    "few_labels",
    "image_files",
    "image_to_tensor",
    "load_data",
    "open_image",
    "upright_size",
]
