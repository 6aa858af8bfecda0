"""TFDS's own contract test over the builders; each count is of lines in a sample file, read by eye."""

import tensorflow_datasets as tfds

from dcjax.data.builders import Math
from dcjax.data.datasets import SAMPLES


def contract(name, **splits):
    members = {
        "DATASET_CLASS": Math,
        "EXAMPLE_DIR": SAMPLES,
        "BUILDER_CONFIG_NAMES_TO_TEST": [name],
        "SPLITS": splits,
        "__module__": __name__,
    }
    return type(f"Test_{name}", (tfds.testing.DatasetBuilderTestCase,), members)


# of 33 lines, three repeat a question, and one repeats it with another answer
Dapo = contract("dapo-math-17k", train=29)
Aime24 = contract("aime24", test=6)
Aime25 = contract("aime25", test=6)
Amc23 = contract("amc23", test=7)
Math500 = contract("math500", test=7)
Minerva = contract("minerva", test=6)
OlympiadBench = contract("olympiadbench", test=7)
