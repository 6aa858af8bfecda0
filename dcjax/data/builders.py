"""The data sets as TFDS builders: prepared once from local copies into ArrayRecord files, read without TensorFlow."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from dcjax.data.datasets import Dataset, Example, datasets
from dcjax.data.sources import checksum, find_files, instructions, read_examples

_log = logging.getLogger(__name__)

FIELDS = ("id", "question", "answer")
"""The fields of an `Example` that are stored, as text."""

VERSION = "1.1.0"
"""Version of the stored examples, raised whenever the same files would give different ones."""


class Math(tfds.core.GeneratorBasedBuilder):
    """Problems in mathematics with checked answers, in the order of the published rows."""

    name = "dcjax_math"
    VERSION = tfds.core.Version(VERSION)
    # if TFDS looked this up, it would need importlib_resources, which it does not install
    code_path = tfds.core.Path(__file__)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in datasets]  # noqa: RUF012, as TFDS has it
    MANUAL_DOWNLOAD_INSTRUCTIONS = "\n".join(instructions(dataset, "MANUAL_DIR") for dataset in datasets.values())

    @property
    def dataset(self) -> Dataset:
        """The declaration of the data set."""
        return datasets[self.builder_config.name]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.dataset.name}: bare questions and answers.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in FIELDS}),
            # examples keep the order of the rows
            disable_shuffling=True,
            homepage=self.dataset.hub,
            citation=self.dataset.citation,
            license=self.dataset.licence,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        data_dir = Path(os.fspath(dl_manager.manual_dir))
        files = find_files(self.dataset, data_dir)
        examples, counts = read_examples(self.dataset, files)
        _log.info("%s: %s", self.dataset.name, ", ".join(f"{name} {count:,}" for name, count in counts.items()))
        checksums = {path.relative_to(data_dir).as_posix(): checksum(path) for path in files}
        self.info.metadata.update(sha256=checksums, counts=counts)
        return {self.dataset.split: self._generate_examples(examples)}

    def _generate_examples(self, examples: list[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, example in enumerate(examples):
            yield number, {name: getattr(example, name) for name in FIELDS}
