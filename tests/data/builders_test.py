"""TFDS's own contract test over the builders; each count is of lines in a sample file, read by eye."""

import unittest

import pytest
import tensorflow_datasets as tfds

from dcjax.data.builders import Math
from dcjax.data.datasets import SAMPLES


def contract(name, splits):
    """TFDS's cases for one builder; made within a test, since to make them imports TensorFlow."""
    members = {
        "DATASET_CLASS": Math,
        "EXAMPLE_DIR": SAMPLES,
        "BUILDER_CONFIG_NAMES_TO_TEST": [name],
        "SPLITS": splits,
        "__module__": __name__,
    }
    return type(f"Test_{name}", (tfds.testing.DatasetBuilderTestCase,), members)


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        # of 33 lines, three repeat a question, and one repeats it with another answer
        ("dapo-math-17k", {"train": 29}),
        ("aime24", {"test": 6}),
        ("aime25", {"test": 6}),
        ("amc23", {"test": 7}),
        ("math500", {"test": 7}),
        ("minerva", {"test": 6}),
        ("olympiadbench", {"test": 7}),
    ],
)
def test_a_builder_keeps_tfds_contract(name, splits):
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(contract(name, splits)).run(result)
    assert result.testsRun >= 5 and not (result.errors or result.failures), result.errors + result.failures
