"""Prepares every data set that has a local copy, and reports the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcjax.data.contamination import Golds, Overlap, check_golds, find_overlap
from dcjax.data.datasets import datasets, find_dataset
from dcjax.data.sources import find_files, instructions
from dcjax.data.store import load_examples, prepare, read_metadata


@dataclass(frozen=True)
class Prepared:
    """The result for one data set."""

    name: str
    sha256: dict[str, str]
    """Fingerprint of each source file."""
    counts: dict[str, int]
    """The rows kept and dropped, as `read_examples` counts them."""
    published: tuple[int, ...]
    """How many examples there should be."""
    golds: Golds
    """The gold answers that prevent fair scores."""


@dataclass(frozen=True)
class Report:
    """The results of `prepare_data`."""

    prepared: list[Prepared]
    missing: dict[str, str]
    """For each data set without a local copy, what to put where."""
    overlaps: list[Overlap]
    """Overlap of each evaluation set with the training set."""

    def __str__(self) -> str:
        lines = [f"{'data set':15}{'rows':>10}{'kept':>8}{'published':>11}{'unreadable':>12}{'refused':>9}  dropped"]
        for each in self.prepared:
            counts = each.counts
            dropped = [f"{counts[why]:,} {why}" for why in ("empty", "duplicate", "conflicting") if counts[why]]
            published = " or ".join(map(str, each.published))
            unreadable, refused = len(each.golds.unreadable), len(each.golds.refused)
            lines.append(
                f"{each.name:15}{counts['rows']:>10,}{counts['kept']:>8,}{published:>11}{unreadable:>12,}{refused:>9,}"
                f"  {', '.join(dropped) or '-'}"
            )
        for each in self.overlaps:
            lines.append(
                f"{each.dataset}: {len(each.exact)} questions as in training, {len(each.ngram)} alike "
                f"({each.share:.1%} of {each.examples})"
            )
            lines += [f"  same   {train} {other}" for train, other in each.exact]
            lines += [f"  alike  {train} {other}" for train, other in each.ngram]
        for each in self.prepared:
            for gold in each.golds.unreadable:
                lines.append(
                    f"{each.name}: gold {gold.answer!r} of {gold.id} cannot be read; only its own text is right"
                )
            for gold in each.golds.refused:
                lines.append(
                    f"{each.name}: gold {gold.answer!r} of {gold.id} is refused, even as its own text in a box"
                )
        return "\n".join(lines + [f"{name}: not there; {what_to_put}" for name, what_to_put in self.missing.items()])


def prepare_data(
    data_dir: Path,
    names: Sequence[str] = tuple(datasets),
    *,
    download: bool = False,
    cache_dir: Path | None = None,
) -> Report:
    """Prepares the data sets that have a copy in `data_dir`, and checks them.

    Args:
      data_dir: the directory of the copies, as `dcjax.data.sources.instructions` describes it.
      names: names in `datasets`.
      download: whether to fetch those without a copy from the Hugging Face Hub first.
      cache_dir: as in `prepare`.

    Raises:
      OSError: a download failed.
      ValueError: there is no such data set, there are several copies of one, or its files have another schema.
    """
    missing, prepared, examples = {}, [], {}
    for name in names:
        dataset = find_dataset(name)
        try:
            find_files(dataset, data_dir)
        except FileNotFoundError:
            if not download:
                missing[name] = instructions(dataset, data_dir)
                continue
            download_dataset(name, data_dir)
        metadata = read_metadata(prepare(name, data_dir, cache_dir=cache_dir))
        examples[name] = load_examples(name, data_dir, cache_dir=cache_dir)
        golds = check_golds(examples[name])
        prepared.append(Prepared(name, metadata["sha256"], metadata["counts"], dataset.counts, golds))
    train = [example for name in examples if datasets[name].split == "train" for example in examples[name]]
    held = [examples[name] for name in examples if datasets[name].split == "test"]
    return Report(prepared, missing, [find_overlap(train, evaluation) for evaluation in held] if train else [])


def download_dataset(name: str, data_dir: Path) -> None:
    """Fetches a data set's files from the Hugging Face Hub into `data_dir`/NAME.

    Raises:
      OSError: there is no network, or no such file on the Hub; the message says what to put where by hand.
    """
    from huggingface_hub import snapshot_download

    dataset = find_dataset(name)
    try:
        snapshot_download(
            dataset.hub, repo_type="dataset", allow_patterns=[*dataset.files], local_dir=data_dir / dataset.name
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{name} was not downloaded ({reason}); {instructions(dataset, data_dir)}") from None
