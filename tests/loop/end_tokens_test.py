"""Which tokens end a response: the same for a folder and for the run that begins from it, whatever is asked of them."""

import dataclasses
import json
import shutil

import numpy as np
import pretend
import pytest
import tiny
from stepping import change_rollouts

import dcjax.loop.evaluate
import dcjax.loop.rollouts
import dcjax.tools.probe.policies
from dcjax.cli import main
from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.errors import RunError
from dcjax.loop.end_tokens import folder_end_tokens, run_end_tokens, starting_end_tokens
from dcjax.loop.run_directory import open_run, recorded_end_tokens
from dcjax.models import read_end_tokens, save_hf
from dcjax.recipe.config import Config
from dcjax.reporting.record import read_transcripts
from dcjax.tools.open_model import open_model
from dcjax.tools.suite.engines import make_suite_engine

pytestmark = pytest.mark.heavy

ENDS = [1, 16]
"""The tokenizer's own end, and a comma."""


def write_folder(path, *, config=None, generation=None, vocab_size=20):
    """What a folder says of its ends, and no weights."""
    path.mkdir(exist_ok=True)
    for name, ids in (("config.json", config), ("generation_config.json", generation)):
        sizes = {"vocab_size": vocab_size} if name == "config.json" else {}
        (path / name).write_text(json.dumps(sizes | ({} if ids is None else {"eos_token_id": ids})))
    return path


# --- what files name ---


@pytest.mark.parametrize(
    ("config", "generation", "named"),
    [
        (None, None, []),
        (5, None, [5]),
        ([7, 5], None, [5, 7]),
        (None, 5, [5]),
        (None, [16, 1], [1, 16]),
        (3, [16, 1, 16], [1, 3, 16]),
        ([], 19, [19]),
        (0, list(range(20)), list(range(20))),
    ],
)
def test_both_files_of_a_folder_name_ends(tmp_path, config, generation, named):
    assert read_end_tokens(write_folder(tmp_path, config=config, generation=generation)) == named


def test_a_folder_need_not_have_a_generation_config(tmp_path):
    (write_folder(tmp_path, config=[2, 3]) / "generation_config.json").unlink()
    assert read_end_tokens(tmp_path) == [2, 3]


WRONG = [True, [True], [1, 2.0], "1", ["1"], -1, [-1], 20, [1, 20], 151645, {"a": 1}, [[1]], [None], [1] * 257]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", WRONG, ids=lambda ids: str(ids)[:20])
def test_what_is_no_token_of_the_vocabulary_is_refused_with_its_file(tmp_path, file, ids):
    write_folder(tmp_path, **{file.split("_")[0].removesuffix(".json"): ids})
    with pytest.raises(ValueError) as caught:
        read_end_tokens(tmp_path)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / file}: eos_token_id is {repr(ids)[:10]}")
    assert told.endswith("it must be a token of the vocabulary, 0 to 19, or a list of at most 256") and "\n" not in told
    assert len(told) < 400


def test_a_damaged_generation_config_is_refused(tmp_path):
    (write_folder(tmp_path) / "generation_config.json").write_text('{"eos_token_id": [1,')
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
        read_end_tokens(tmp_path)


def test_a_generation_config_of_which_only_the_link_was_downloaded_is_refused(tmp_path):
    path = write_folder(tmp_path) / "generation_config.json"
    path.unlink()
    path.symlink_to(tmp_path / "blobs" / "5f3a")
    with pytest.raises(FileNotFoundError, match=r"generation_config\.json"):
        read_end_tokens(tmp_path)


# --- folders with their tokenizers, and runs ---


@pytest.fixture
def folder(tmp_path):
    """A model's architecture and what it says of its ends."""
    save_hf(tmp_path / "model", tiny.DENSE, tiny.masters(tiny.DENSE), token_ids={"eos_token_id": 4})
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [16, 7]}')
    return tmp_path / "model"


def test_a_folders_ends_are_its_tokenizers_and_those_that_its_files_name(folder):
    assert folder_end_tokens(folder, build_tokenizer()) == [1, 4, 7, 16]


def test_a_tokenizer_that_ends_beyond_the_vocabulary_is_refused(folder):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(200)
    with pytest.raises(RunError, match=r"the tokenizer for .*model: eos_token_id is 200; it must be a token of the"):
        folder_end_tokens(folder, tokenizer)


def begun(tmp_path, folder, ends):
    """The config of a run from the folder, which has been started; and its ends as they are recorded."""
    config = dataclasses.replace(tiny.CONFIG, pretrained=folder, run_dir=tmp_path / "run")
    with open_run(config, end_tokens=ends):
        pass
    return config


def test_a_run_goes_on_with_the_ends_that_it_began_with_whatever_its_folder_says_now(tmp_path, folder):
    config = dataclasses.replace(tiny.CONFIG, pretrained=folder, run_dir=tmp_path / "run")
    ends = starting_end_tokens(config, build_tokenizer())
    assert ends == [1, 4, 7, 16]
    begun(tmp_path, folder, ends)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert folder_end_tokens(folder, build_tokenizer()) == [1, 4, 9]
    assert starting_end_tokens(config, build_tokenizer()) == ends
    assert run_end_tokens(config.directory, config, build_tokenizer()) == ends
    # as on another machine
    moved = shutil.move(config.directory, tmp_path / "moved")
    assert run_end_tokens(moved, config, build_tokenizer()) == ends


def test_an_older_run_goes_on_with_its_tokenizers_end(tmp_path, folder):
    config = begun(tmp_path, folder, ENDS)
    path = config.directory / "config.json"
    recorded = json.loads(path.read_text())
    assert recorded.pop("end_tokens") == ENDS
    path.write_text(json.dumps(recorded))
    assert recorded_end_tokens(config.directory, config) == []
    assert starting_end_tokens(config, build_tokenizer()) == [1]
    assert run_end_tokens(config.directory, config, build_tokenizer()) == [1]


@pytest.mark.parametrize("damage", [[True], [1, 20], "1", [-1]])
def test_a_record_of_what_are_no_tokens_is_refused(tmp_path, folder, damage):
    config = begun(tmp_path, folder, ENDS)
    path = config.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"end_tokens": damage}))
    with pytest.raises(RunError) as caught:
        starting_end_tokens(config, build_tokenizer())
    assert str(caught.value).startswith(f"{path}: end_tokens is {damage!r}; it must be a token of the vocabulary")


def test_the_directory_of_another_run_is_refused_before_its_ends_are_read(tmp_path, folder):
    config = begun(tmp_path, folder, [19])
    other = dataclasses.replace(config, model=dataclasses.replace(tiny.DENSE, vocab_size=19))
    with pytest.raises(RunError, match=r"holds a run of another config: model\.vocab_size 19 \(there 20\)"):
        starting_end_tokens(other, build_tokenizer())


def test_without_a_folder_the_tokenizers_end_is_the_only_one(tmp_path):
    assert starting_end_tokens(Config(run_dir=tmp_path / "run"), build_tokenizer()) == [1]


# --- from a folder to a run, to what is asked of both ---


def sampled_by(patch, module):
    """What a module samples from now on."""
    seen = []

    def see(engine, rollout):
        seen.append(rollout)
        return rollout

    change_rollouts(patch, module, see)
    return seen


def assert_ended_by(rollouts, ends):
    """Every one of the ends, and nothing else, ends a response, and is a token of it with a log-prob of its own."""
    seen = set()
    assert rollouts
    for rollout in rollouts:
        mask = np.asarray(rollout.response_mask)
        tokens, lengths = rollout.tokens[:, -mask.shape[1] :], mask.sum(axis=1)
        last = tokens[np.arange(len(tokens)), lengths - 1]
        np.testing.assert_array_equal(rollout.finished, np.isin(last, ends))
        assert (np.isin(tokens, ends) & mask).sum() == rollout.finished.sum()
        assert (rollout.rollout_logps[np.arange(len(tokens)), lengths - 1][rollout.finished] < 0).all()
        seen |= set(last[rollout.finished].tolist())
    assert seen == set(ends)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of a random model, published with two ends of which its tokenizer knows one."""
    path = tmp_path_factory.mktemp("models") / "published"
    save_hf(path, tiny.DENSE, tiny.masters(tiny.DENSE), token_ids={"eos_token_id": 1, "pad_token_id": 0})
    build_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return path


@pytest.fixture(scope="module")
def trained(published, tmp_path_factory):
    """A run of one iteration from it, and what was sampled meanwhile by training and by evaluations."""
    root = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(
        tiny.CONFIG,
        steps=1,
        warm_start=dataclasses.replace(tiny.CONFIG.warm_start, steps=0),
        # one program for both policies
        serving=dataclasses.replace(tiny.CONFIG.serving, format="float32"),
        pretrained=published,
    )
    recipe = tiny.write_recipe(root / "recipe.py", config)
    with pytest.MonkeyPatch.context() as patch:
        training, evaluation = sampled_by(patch, dcjax.loop.rollouts), sampled_by(patch, dcjax.loop.evaluate)
        assert main(["train", str(recipe), "--run-dir", str(root / "run")]) == 0
    return root / "run", training, evaluation


def test_the_ends_of_a_folder_end_responses_in_training_and_its_evaluations(trained):
    directory, training, evaluation = trained
    assert_ended_by(training, ENDS)
    assert_ended_by(evaluation, ENDS)
    assert json.loads((directory / "config.json").read_text())["end_tokens"] == ENDS
    # a comma that ended a response is no part of its text
    finished = [sample["response"] for sample in read_transcripts(directory / "samples.jsonl") if sample["finished"]]
    assert finished and not any("," in text for text in finished)


def test_they_do_when_the_run_is_evaluated(trained, monkeypatch):
    sampled = sampled_by(monkeypatch, dcjax.loop.evaluate)
    assert main(["evaluate", str(trained[0])]) == 0
    assert_ended_by(sampled, ENDS)


def test_they_do_when_the_run_or_the_folder_is_probed(trained, published, monkeypatch, tmp_path):
    """Looked at where the probe begins to sample: what it does behind that takes a minute."""
    asked = []

    def stop(engine, params, prompts, **settings):
        asked.append((engine.end_tokens, settings.get("stop_tokens")))
        raise RunError("stopped")

    monkeypatch.setattr(dcjax.tools.probe.policies, "sample_responses", stop)
    (tmp_path / "prompts").write_text("1+2=\n")
    for command in ([str(trained[0])], [str(published), "--prompts-file", str(tmp_path / "prompts")]):
        assert main(["probe", *command, "--formats", "float32"]) == 2
    assert asked == [(ENDS, None)] * 2


def test_a_run_that_goes_on_samples_under_the_ends_that_it_began_with(published, monkeypatch, tmp_path):
    """Six of them; the folder says others by then."""
    six = [1, 4, 7, 9, 11, 16]
    folder = shutil.copytree(published, tmp_path / "folder")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": six[1:]}))
    unwarmed = dataclasses.replace(tiny.CONFIG.warm_start, steps=0)
    config = dataclasses.replace(tiny.CONFIG, steps=4, warm_start=unwarmed, pretrained=folder)
    command = ["train", str(tiny.write_recipe(tmp_path / "recipe.py", config)), "--run-dir", str(tmp_path / "run")]
    pretend.install(monkeypatch)
    asked = []

    def seen(engine, rollout):
        asked.append(engine.end_tokens)
        return rollout

    change_rollouts(monkeypatch, dcjax.loop.rollouts, seen)
    change_rollouts(monkeypatch, dcjax.loop.evaluate, seen)
    assert main(command) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (folder / "generation_config.json").unlink()
    began = len(asked)
    assert main(command) == 0
    assert asked == [six] * len(asked) and len(asked) > began > 0


def test_a_suite_asks_the_run_and_the_folder_under_the_same_ends(trained, published):
    for source in (trained[0], published):
        model = open_model(source)
        assert model.end_tokens == ENDS
        for policy in ("deployed", "training"):
            engine = make_suite_engine(model, policy, max_prompt_length=4, max_response_length=4)
            assert engine.end_tokens == ENDS


def test_an_export_of_the_run_names_them_in_both_files_as_transformers_reads_them(trained, tmp_path):
    from transformers import AutoConfig, GenerationConfig

    assert main(["convert", "export", str(trained[0]), str(tmp_path / "out")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ENDS
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == ENDS
    assert folder_end_tokens(tmp_path / "out", build_tokenizer()) == ENDS
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert (fields["eos_token_id"], fields["pad_token_id"]) == (ENDS, 0)


def test_a_folder_with_ends_that_it_cannot_have_is_refused_in_one_line(published, capfd, tmp_path):
    bad = shutil.copytree(published, tmp_path / "bad")
    (bad / "generation_config.json").write_text('{"eos_token_id": [1, 20]}')
    recipe = tiny.write_recipe(tmp_path / "recipe.py", dataclasses.replace(tiny.CONFIG, pretrained=bad))
    (tmp_path / "prompts").write_text("1+2=\n")
    commands = [
        ["train", str(recipe), "--run-dir", str(tmp_path / "run")],
        ["evaluate", str(bad), "--suite", "paper"],
        ["probe", str(bad), "--prompts-file", str(tmp_path / "prompts")],
        ["convert", "import", str(bad), str(tmp_path / "out")],
    ]
    for command in commands:
        assert main(command) == 2
        told = capfd.readouterr().err.splitlines()
        assert told == [
            f"dcjax: error: {bad / 'generation_config.json'}: eos_token_id is [1, 20]; it must be a token of the "
            "vocabulary, 0 to 19, or a list of at most 256"
        ], command
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
