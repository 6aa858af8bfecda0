import contextlib
import json
import os
import resource
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from damage import halve, largest_array_file

from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints, Cursor, whole
from dcjax.models import ModelConfig
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = [
    pytest.mark.heavy,
    # reads that Orbax has begun end after another one has failed
    pytest.mark.filterwarnings("ignore:.*_read_array_index_and_device_put:pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = tiny.CONFIG


def on(config):
    """The mesh of a config, and its abstract state there."""
    mesh = make_mesh(config)
    return mesh, build.abstract_state(CONFIG, mesh)


@pytest.fixture(scope="module")
def like():
    return on(MeshConfig())[1]


def filled(like, seed):
    """A state of random numbers, no two leaves alike, where `like` says."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        value = rng.standard_normal(leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else rng.integers(1000)
        return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, like)


def loop_at(step):
    return Cursor(step=step, data_cursor=32 * step, rollout_key=[step, 2**32 - 1 - step])


def host(state):
    return jax.tree.map(np.asarray, jax.device_get(state))


def same(ours, theirs):
    """Whether two states are equal bit for bit, in values, shapes and dtypes."""
    ours, theirs = jax.tree.leaves_with_path(host(ours)), jax.tree.leaves_with_path(host(theirs))
    return len(ours) == len(theirs) and all(
        path == other and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for (path, a), (other, b) in zip(ours, theirs, strict=True)
    )


def save(directory, like, *steps, keep=3):
    """Saves a state of its own for each step, and waits."""
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(filled(like, step), loop_at(step))


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, like):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, like, 1, 2)
    return directory


@pytest.fixture
def saved(two_saved, tmp_path):
    """A copy of a directory that holds checkpoints 1 and 2."""
    return shutil.copytree(two_saved, tmp_path / "checkpoints")


def refusal(action):
    """The message of the RunError that a call raises, which is one line."""
    with pytest.raises(RunError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_state_comes_back_bit_for_bit_with_the_loop(two_saved, like):
    with Checkpoints(two_saved) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
        for step in (1, 2):
            state, loop = checkpoints.restore(step, like)
            assert same(state, filled(like, step))
            assert loop == loop_at(step)


def test_numbers_that_are_not_finite_come_back_as_they_were(tmp_path, like):
    """A run that is stopped by a NaN has its state looked at."""
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-45], np.float32)
    state = jax.tree.map(
        lambda leaf: jnp.resize(odd, leaf.shape) if leaf.dtype == jnp.float32 else leaf, filled(like, 1)
    )
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(state, loop_at(1))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert same(checkpoints.restore(1, like)[0], state)


def params_of(state):
    return state.params


def test_a_part_of_a_state_is_read_alone(two_saved, like):
    """No other array is made: what is live then is the part, to the byte."""
    part_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(filled(like, 2).params))
    before = {id(array) for array in jax.live_arrays()}
    with Checkpoints(two_saved) as checkpoints:
        params, loop = checkpoints.restore(2, like, params_of)
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in before) == part_bytes
    assert same(params, filled(like, 2).params) and loop == loop_at(2)


def save_as_formerly(directory, state, step, *, fingerprint):
    """A checkpoint as the first versions wrote them: one fingerprint, Σ 31ⁿ⁻¹⁻ⁱ × (sum of the bits of array i)."""
    described = {"step": step, "data_cursor": 32 * step, "rollout_key": loop_at(step).rollout_key}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(described | {"fingerprint": fingerprint})
    )
    with ocp.CheckpointManager(directory) as manager:
        manager.save(step, args=items)


def bits_of(state):
    total = 0
    for leaf in jax.tree.leaves(host(state)):
        total = total * 31 + int(np.sum(np.atleast_1d(leaf).view(f"u{leaf.itemsize}"), dtype=np.uint64))
    return total % 2**32


def test_checkpoints_of_the_first_versions_are_read_whole_and_in_part(tmp_path, like):
    state = filled(like, 1)
    save_as_formerly(tmp_path / "right", state, 1, fingerprint=bits_of(state))
    save_as_formerly(tmp_path / "wrong", state, 1, fingerprint=bits_of(state) ^ 1)
    with Checkpoints(tmp_path / "right") as checkpoints:
        restored, loop = checkpoints.restore(1, like)
        assert same(restored, state) and loop == loop_at(1)
        assert same(checkpoints.restore(1, like, params_of)[0], state.params)
    with Checkpoints(tmp_path / "wrong") as checkpoints:
        for part in (whole, params_of):
            assert "not the ones that were saved" in refusal(lambda part=part: checkpoints.restore(1, like, part))


def test_the_multiplier_and_the_schedule_are_part_of_the_state(two_saved, like):
    with Checkpoints(two_saved) as checkpoints:
        state, _ = checkpoints.restore(2, like)
    names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree.leaves_with_path(state.opt_state)}
    assert {".multiplier", ".count"} <= names


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"data": 2, "fsdp": 2}, {"tensor": 2}], ids=str)
def test_a_state_is_restored_onto_another_mesh(two_saved, axes):
    mesh, like = on(MeshConfig(**axes))
    with Checkpoints(two_saved) as checkpoints:
        state, loop = checkpoints.restore(2, like)
    assert same(state, filled(like, 2)) and loop == loop_at(2)
    jax.tree.map(lambda leaf, wanted: pytest.fail() if leaf.sharding != wanted.sharding else None, state, like)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert (len(split) > 0) == ("fsdp" in axes or "tensor" in axes)
    assert len(split[0].devices()) == mesh.size


def test_a_state_that_was_saved_from_a_mesh_is_restored_onto_one_device(tmp_path, like):
    _, sharded = on(MeshConfig(fsdp=4))
    save(tmp_path / "checkpoints", sharded, 1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert same(checkpoints.restore(1, like)[0], filled(like, 1))


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2}], ids=str)
def test_what_is_saved_does_not_change_when_the_state_is_donated_at_once(tmp_path, axes):
    """Donated buffers are written over by the next step while the save is still running in the background."""
    _, like = on(MeshConfig(**axes))
    overwrite = jax.jit(partial(jax.tree.map, lambda leaf: leaf * 0 - 7), donate_argnums=0)
    saved = {}
    with Checkpoints(tmp_path / "checkpoints", keep=6) as checkpoints:
        for step in range(1, 7):
            state = filled(like, step)
            saved[step] = host(filled(like, step))
            checkpoints.save(state, loop_at(step))
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, state in saved.items():
            assert same(checkpoints.restore(step, like)[0], state)


def test_only_the_newest_are_kept(tmp_path, like):
    save(tmp_path / "checkpoints", like, 0, 10, 20, 25, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "25"]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [20, 25]


def test_a_directory_that_is_only_read_is_not_changed(saved, like):
    """`dcjax evaluate` may read while `dcjax train` writes."""
    shutil.copytree(saved / "2", saved / "3.orbax-checkpoint-tmp")
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert same(checkpoints.restore(checkpoints.latest(), like)[0], filled(like, 2))
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


def test_a_save_that_was_killed_is_not_seen_and_not_in_the_way(saved, like):
    shutil.copytree(saved / "2", saved / "3.orbax-checkpoint-tmp")
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        state, loop = checkpoints.restore_latest(like)
        assert loop.step == 2 and same(state, filled(like, 2))
        checkpoints.save(filled(like, 3), loop_at(3))
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert same(checkpoints.restore(3, like)[0], filled(like, 3))


def test_a_run_without_checkpoints_has_none_to_go_on_from(tmp_path, like):
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore_latest(like) is None
        assert "no checkpoint in" in refusal(checkpoints.latest)


def test_reading_where_there_is_no_directory_makes_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert f"no checkpoint in {tmp_path / 'checkpoints'}" in refusal(checkpoints.latest)
    assert not (tmp_path / "checkpoints").exists()


def test_a_missing_step_lists_those_there_are(two_saved, like):
    with Checkpoints(two_saved) as checkpoints:
        message = refusal(lambda: checkpoints.restore(7, like))
    assert "no checkpoint of step 7" in message and message.endswith("there: 1, 2")


@pytest.mark.parametrize("damage", [halve, os.remove], ids=["truncated", "deleted"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_taken(saved, like, capfd, damage):
    damage(largest_array_file(saved / "2"))
    with Checkpoints(saved, keep=3) as checkpoints:
        state, loop = checkpoints.restore_latest(like)
        assert loop == loop_at(1) and same(state, filled(like, 1))
        errors = capfd.readouterr().err
        assert errors.startswith(f"dcjax: checkpoint {saved / '2'} is damaged: ")
        assert errors.endswith("trying the one before it\n") and errors.count("\n") == 1, errors
        # set aside for inspection, so that the step can be saved again
        assert checkpoints.steps() == [1] and (saved / "2.damaged").is_dir()
        checkpoints.save(filled(like, 9), loop_at(2))
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert same(checkpoints.restore(2, like)[0], filled(like, 9))


def test_a_checkpoint_that_is_damaged_twice_is_set_aside_twice(saved, like, capfd):
    shutil.copytree(saved / "2", saved / "2.damaged")
    halve(largest_array_file(saved / "2"))
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.restore_latest(like)[1] == loop_at(1)
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2.damaged"]


def test_where_all_checkpoints_are_damaged_the_run_is_refused(saved, like, capfd):
    for step in ("1", "2"):
        os.remove(largest_array_file(saved / step))
    with Checkpoints(saved, keep=3) as checkpoints:
        message = refusal(lambda: checkpoints.restore_latest(like))
    assert f"all checkpoints in {saved} are damaged" in message and "--run-dir" in message
    assert [line.split()[2] for line in capfd.readouterr().err.splitlines()] == [str(saved / "2"), str(saved / "1")]


def test_a_run_whose_checkpoints_were_all_damaged_stays_refused(saved, like, capfd):
    """The second attempt must not take the emptied directory for a new run and overwrite what is left of the old."""
    for step in ("1", "2"):
        os.remove(largest_array_file(saved / step))
    for _ in range(2):
        with Checkpoints(saved, keep=3) as checkpoints:
            assert "damaged" in refusal(lambda: checkpoints.restore_latest(like))


@pytest.mark.parametrize(
    "kind",
    ["truncated", pytest.param("emptied", marks=pytest.mark.slow), pytest.param("deleted", marks=pytest.mark.slow)],
)
def test_whatever_file_is_damaged_nothing_wrong_is_restored(saved, like, kind):
    """Each file in turn: either the checkpoint is called damaged, or what comes back is what was saved."""
    expected, damaged = filled(like, 2), 0
    for path in files(saved / "2"):
        whole = path.read_bytes()
        if not whole:
            continue
        if kind == "deleted":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2 if kind == "truncated" else 0])
        with Checkpoints(saved) as checkpoints:
            try:
                state, loop = checkpoints.restore(2, like)
            except RunError:
                damaged += 1
            else:
                assert same(state, expected) and loop == loop_at(2), f"{path} {kind}"
        path.write_bytes(whole)
    assert damaged > 0
    with Checkpoints(saved) as checkpoints:
        assert same(checkpoints.restore(2, like)[0], expected)


def test_one_wrong_bit_in_the_arrays_is_damage(saved, like):
    """As a failing disk leaves it: no file is shorter, and yet a parameter is not what was saved."""
    path = largest_array_file(saved / "2")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with Checkpoints(saved) as checkpoints:
        assert "is damaged" in refusal(lambda: checkpoints.restore(2, like))
        # and so where only a part is read, if it is in the part
        whole_state, parts = filled(like, 2), (params_of, lambda state: state.opt_state)
        refused = 0
        for part in parts:
            try:
                assert same(checkpoints.restore(2, like, part)[0], part(whole_state))
            except RunError:
                refused += 1
    assert refused == 1


@pytest.mark.parametrize("nonsense", [b"{}", b"[]", b'{"step": 2}', b'{"step": 2, "data_cursor": 64, "key": 1}'])
def test_a_loop_state_that_lacks_a_field_is_damage(saved, like, nonsense):
    (written,) = (path for path in files(saved / "2" / "loop") if b"data_cursor" in path.read_bytes())
    assert json.loads(written.read_bytes())["data_cursor"] == 64
    written.write_bytes(nonsense)
    with Checkpoints(saved) as checkpoints:
        assert "is damaged" in refusal(lambda: checkpoints.restore(2, like))


def test_a_state_of_another_model_is_refused(two_saved):
    other = Config(model=ModelConfig(hidden_size=16, intermediate_size=64))
    like = build.abstract_state(other, make_mesh(MeshConfig()))
    with Checkpoints(two_saved) as checkpoints:
        assert str(two_saved / "2") in refusal(lambda: checkpoints.restore(2, like))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(saved, like, capfd):
    size = largest_array_file(saved / "2").stat().st_size

    def save_on_a_full_disk():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # files may grow to a part of what the state needs
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, hard))
        try:
            with Checkpoints(saved, keep=3) as checkpoints:
                checkpoints.save(filled(like, 3), loop_at(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert f"cannot write to {saved}" in refusal(save_on_a_full_disk)
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        state, loop = checkpoints.restore_latest(like)
        assert loop == loop_at(2) and same(state, filled(like, 2))
        checkpoints.save(filled(like, 3), loop_at(3))
    with Checkpoints(saved) as checkpoints:
        assert same(checkpoints.restore(3, like)[0], filled(like, 3))


def test_a_failed_save_does_not_hide_why_the_loop_failed(saved, like):
    with pytest.raises(ZeroDivisionError), Checkpoints(saved, keep=3) as checkpoints:
        shutil.rmtree(saved)
        saved.write_text("in the way")
        with contextlib.suppress(RunError):
            checkpoints.save(filled(like, 3), loop_at(3))
        raise ZeroDivisionError
